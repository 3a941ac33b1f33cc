//! Encrypted block devices: AES-XTS on another bdev, as SPDK's `crypto` stores it.
//!
//! A key (`keys`) has a name, and encrypts (`xts`) any number of disks ([`CryptoDisk`]). Block
//! *n* of a disk is block *n* of its base; nothing else is stored. A channel (`channel`) has a
//! fixed set of buffers: data passes through them, encrypted or decrypted in place, so that a block
//! is encrypted as a whole wherever the guest's segments divide it. The module ([`CryptoModule`])
//! has the RPC methods.
//!
//! Forbidden dependencies: an async runtime, the virtqueues, and the target.

mod xts;

mod keys;

mod channel;
mod disk;

mod module;

pub use disk::{CryptoDisk, CryptoOptions};
pub use keys::{Key, KeyError};
pub use module::CryptoModule;
