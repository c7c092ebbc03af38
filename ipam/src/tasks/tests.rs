//! Tests of the tasks on a node that is plain data.

mod fake;
mod lease;
mod operator;
mod deleted_meanwhile;
mod pods;
mod publisher;
mod registrar;

use super::*;
