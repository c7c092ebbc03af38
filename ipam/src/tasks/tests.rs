//! The tasks on a node that is plain data.

mod fake;
mod operator;
mod pods;
mod registrar;

use super::*;
