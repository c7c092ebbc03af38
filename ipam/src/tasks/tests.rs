//! Tests of the tasks on a node that is plain data.

mod deleted_meanwhile;
mod fake;
mod lease;
mod operator;
mod pods;
mod publisher;
mod registrar;

use super::*;
