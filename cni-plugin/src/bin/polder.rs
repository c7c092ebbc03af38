//! The main plugin: attaches pods. If called as `loopback`, it is the loopback plugin.

use std::process::ExitCode;

use polder_cni_plugin::call::Program;

fn main() -> ExitCode {
    let called = std::env::args_os().next().unwrap_or_default();
    polder_cni_plugin::process::main(Program::called(&called))
}
