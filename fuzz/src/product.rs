//! Parts of `vhost-app`, which is no library, taken in as they are.

#[path = "../../vhost-app/src/config_file.rs"]
pub(crate) mod config_file;
