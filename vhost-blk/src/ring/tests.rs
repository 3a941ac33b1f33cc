//! Tests of split rings.
