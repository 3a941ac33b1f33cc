//! The session's state machine, driven directly: every message in every state, for each kind of
//! device.
#![expect(clippy::unwrap_used, reason = "tests")]

#[expect(dead_code, reason = "a session opens no queue")]
mod entropy;
mod session {
    pub(crate) mod changes;
    pub(crate) mod scene;
    pub(crate) mod states;
}

/// Runs every test for a device.
macro_rules! for_device {
    ($name:ident: $device:ty) => {
        mod $name {
            for_device! { @ $device,
                states {
                    start_stop_and_restart
                    a_drain_that_is_reported_twice_answers_once
                    closing_cancels_a_pending_reply
                    gated_rings_wait
                    closing_while_gated_leaves_nothing_to_drain
                    messages_that_end_an_opening
                    a_reset_and_a_restart_while_draining
                    a_restart_that_is_stopped_while_the_ring_still_drains
                    a_ring_that_was_reset_keeps_its_view_until_it_has_drained
                    a_packed_ring_has_two_positions
                    a_packed_ring_that_was_reset_has_two_positions
                    a_reset_is_acknowledged_when_all_rings_have_drained
                    a_reset_waits_for_earlier_io
                }
                changes {
                    parameters_that_cannot_change_while_started
                    invalid_parameters_are_refused
                    memory_and_call_changes_reach_running_rings_only
                    only_logging_is_switched_while_running
                    all_memory_is_marked_when_earlier_io_has_ended
                    all_memory_is_marked_when_a_ring_has_drained_that_was_reset
                    a_config_change_is_pending_until_it_is_announced
                    an_area_stays_until_it_is_replaced
                    an_area_may_come_before_the_features
                    memory_may_be_removed_when_no_started_ring_is_in_it
                    a_write_to_the_config_space_reaches_running_rings
                }
            }
        }
    };
    (@ $device:ty, $($suite:ident { $($test:ident)* })*) => {
        $(mod $suite {
            $(#[test]
            fn $test() {
                crate::session::$suite::$test::<$device>();
            })*
        })*
    };
}

for_device!(block: crate::session::scene::Block);
for_device!(scsi: crate::session::scene::ScsiDevice);
for_device!(entropy_device: crate::session::scene::EntropyDevice);
