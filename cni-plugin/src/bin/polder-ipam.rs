//! The IPAM plugin: allocates addresses for other plugins.

use std::process::ExitCode;

use polder_cni_plugin::call::Program;

fn main() -> ExitCode {
    polder_cni_plugin::process::main(Program::PolderIpam)
}
