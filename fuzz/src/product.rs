//! Modules of `vhost-app`, which is not a library, included as source.

#[path = "../../vhost-app/src/config_file/mod.rs"]
pub(crate) mod config_file;
