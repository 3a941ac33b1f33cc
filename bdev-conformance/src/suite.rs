//! The macro that makes a test of each check.

/// Makes a module of tests for each named disk: every check, on a fresh disk.
///
/// The expression is a [`Fixture`](crate::Fixture), or an `Option<Fixture>` that is `None` where the
/// machine cannot provide the disk; the expression then reports the skipped test. It can use the
/// names of the module in which the macro is called.
#[macro_export]
macro_rules! conformance {
    ($($name:ident => $make:expr;)*) => {$(
        mod $name {
            use super::*;

            $crate::conformance!(@checks $make;
                reads_back_what_was_written,
                segments_may_be_split_and_aligned_in_any_way,
                a_range_past_the_end_is_an_error,
                an_empty_range_is_fine,
                flush_completes,
                unmap_leaves_a_readable_range_and_its_neighbours,
                write_zeroes_reads_as_zeroes_and_spares_the_neighbours,
                a_long_request_is_done_to_its_end,
                as_many_as_the_depth_are_taken_and_each_ends_once,
                completions_come_out_one_at_a_time_if_asked_so,
                a_channel_works_on_another_thread,
                two_channels_see_each_other_s_writes,
                a_dropped_channel_lets_go_of_the_disk,
            );

            #[test]
            fn random_mix_matches_a_model() {
                $crate::model::matches_a_model(|| Option::<$crate::Fixture>::from($make));
            }
        }
    )*};
    (@checks $make:expr; $($check:ident,)*) => {$(
        #[test]
        fn $check() {
            if let Some(fixture) = Option::<$crate::Fixture>::from($make) {
                $crate::checks::$check(&fixture);
            }
        }
    )*};
}
