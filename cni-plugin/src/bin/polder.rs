//! The main plugin: attaches pods. Called as `loopback`, it is the plugin of that name.

use std::process::ExitCode;

use polder_cni_plugin::call::Program;

fn main() -> ExitCode {
    let called = std::env::args_os().next().unwrap_or_default();
    polder_cni_plugin::process::main(Program::called(&called))
}
