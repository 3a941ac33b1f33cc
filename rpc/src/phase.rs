//! The phases of the application's startup, in which methods may be called.

/// The state of the application's startup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Before the subsystems are initialised.
    Startup,
    /// After the initialisation of the subsystems has begun.
    Runtime,
}

/// The phases in which a method may be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phases {
    /// Only before initialisation.
    Startup,
    /// Only after it.
    Runtime,
    /// Always.
    Both,
}

impl Phases {
    /// Whether a method with these phases may be called in `phase`.
    pub fn contains(self, phase: Phase) -> bool {
        match self {
            Self::Startup => phase == Phase::Startup,
            Self::Runtime => phase == Phase::Runtime,
            Self::Both => true,
        }
    }
}
