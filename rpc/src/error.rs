//! The error of a call: a code and a text, as SPDK answers them.

use thiserror::Error;

/// The error that a method answers.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{message} ({code})")]
pub struct RpcError {
    /// A JSON-RPC code (-32768..=-32000), a negative errno, or -1 for the wrong phase.
    pub code: i64,
    /// The text that clients see. Some clients compare it.
    pub message: String,
}

impl RpcError {
    /// The bytes are not JSON.
    pub const PARSE_ERROR: i64 = -32700;
    /// The JSON value is not a request.
    pub const INVALID_REQUEST: i64 = -32600;
    /// There is no such method, or it is not allowed.
    pub const METHOD_NOT_FOUND: i64 = -32601;
    /// The parameters are invalid for the method.
    pub const INVALID_PARAMS: i64 = -32602;
    /// The method failed.
    pub const INTERNAL: i64 = -32603;
    /// The method may not be called in this phase.
    pub const INVALID_STATE: i64 = -1;

    /// An error with this code and text.
    pub fn new(code: i64, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// Code -32602 with this text.
    pub fn invalid_params(message: impl Into<String>) -> Self {
        Self::new(Self::INVALID_PARAMS, message)
    }

    /// Code -32603 with this text.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Self::INTERNAL, message)
    }

    /// Code `-errno` with glibc's text; `errno` is positive.
    pub fn errno(errno: i32) -> Self {
        Self::new(-i64::from(errno), strerror(errno))
    }

    /// This code with glibc's text for a positive `errno`, as the vhost methods answer.
    pub fn with_strerror(code: i64, errno: i32) -> Self {
        Self::new(code, strerror(errno))
    }

    /// The bytes are not JSON.
    pub fn parse_error() -> Self {
        Self::new(Self::PARSE_ERROR, "Parse error")
    }

    /// The JSON value is not a request.
    pub fn invalid_request() -> Self {
        Self::new(Self::INVALID_REQUEST, "Invalid request")
    }

    /// There is no such method, or it is not allowed.
    pub fn method_not_found() -> Self {
        Self::new(Self::METHOD_NOT_FOUND, "Method not found")
    }
}

/// glibc's text for a positive errno: "File exists" for 17.
pub fn strerror(errno: i32) -> String {
    let mut text = std::io::Error::from_raw_os_error(errno).to_string();
    // std appends the number to the text of `strerror_r`.
    let suffix = format!(" (os error {errno})");
    if text.ends_with(&suffix) {
        text.truncate(text.len() - suffix.len());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errno_has_the_negative_code_and_glibcs_text() {
        assert_eq!(RpcError::errno(17), RpcError::new(-17, "File exists"));
        assert_eq!(RpcError::errno(19), RpcError::new(-19, "No such device"));
        assert_eq!(strerror(16), "Device or resource busy");
        assert_eq!(strerror(5), "Input/output error");
        assert_eq!(strerror(4096), "Unknown error 4096");
    }
}
