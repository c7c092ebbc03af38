//! Texts for objects of Kubernetes.

/// The most bytes of a text. Other components use the same limit for Events.
const LONGEST: usize = 1024;

/// The text, or its beginning if it is too long.
pub(super) fn shortened(text: &str) -> String {
    const MORE: &str = " ...";
    if text.len() <= LONGEST {
        return text.to_owned();
    }
    let end = text.floor_char_boundary(LONGEST - MORE.len());
    format!("{}{MORE}", &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_is_cut_between_characters() {
        assert_eq!(shortened("no path"), "no path");
        let long = shortened(&"é".repeat(600));
        assert!(long.len() <= LONGEST && long.ends_with("é ..."), "{}", long.len());
    }
}
