//! The suites of the queue engine, generic over devices: recovery from an in-flight area, hostile
//! rings, stops, calls, dirty pages, and packed rings. Each test runs on split and on packed rings,
//! unless it tests a feature of one layout.
//!
//! A device implements [`device::TestDevice`] in a test of its own crate, which includes this file
//! by its path and calls `device_suites!`.
#![expect(clippy::unwrap_used, reason = "tests")]

pub(crate) mod device;
pub(crate) mod scene;
pub(crate) mod split;

#[path = "../../../virtqueue/tests/packed_ring/driver.rs"]
#[expect(dead_code, reason = "the packed ring's own tests use the rest")]
pub(crate) mod packed;

pub(crate) mod area;
pub(crate) mod calls;
pub(crate) mod dirty;
pub(crate) mod hostile;
pub(crate) mod overlap;
pub(crate) mod recovery;
pub(crate) mod stops;

/// Runs every test of the suites for a device, which is named by its path from `crate`.
macro_rules! device_suites {
    ($device:ty) => {
        device_suites! { @ $device,
            area {
                invalid_contents_of_the_area_break_only_its_queue
                an_invalid_free_list_breaks_the_queue
                an_area_for_other_rings_is_refused
                the_reported_position_is_the_driver_s
            }
            calls {
                a_refused_call_is_retried_at_the_next_visit
                a_stop_waits_for_a_refused_call
                a_sleep_with_a_refused_call_is_limited
                a_stopping_queue_makes_the_delayed_call
                a_delayed_call_is_made_when_coalescing_is_switched_off
                a_change_during_the_last_visit_prevents_sleep
                a_request_during_the_last_visit_prevents_sleep
            }
            dirty {
                pages_are_marked_that_a_request_writes_and_no_others
                io_under_an_earlier_memory_table_marks_its_pages
            }
            hostile {
                chains_with_invalid_buffers_are_returned
                chains_without_an_end_are_returned
                invalid_indirect_tables_are_returned
                a_head_out_of_range_is_returned
                a_visit_is_bounded
                an_index_that_jumps_stops_only_its_ring
                an_index_that_goes_back_stops_only_its_ring
                a_used_ring_that_the_guest_writes_changes_nothing
                descriptors_that_change_in_flight_are_not_read_again
                a_packed_chain_without_an_end_breaks_the_ring
                random_rings_break_only_their_queue
            }
            overlap {
                a_chain_that_overlaps_one_in_flight_breaks_the_ring
                a_chain_that_overlaps_one_answered_in_the_same_visit_breaks_the_ring
                a_chain_that_fits_exactly_is_accepted
                chains_before_an_invalid_one_are_served
            }
            recovery {
                requests_in_flight_are_resubmitted_in_order_before_new_ones
                kills_after_every_visit_lose_and_repeat_nothing
                long_chains_are_resubmitted_with_their_data
                a_full_channel_delays_resubmission
                a_stop_before_the_first_visit_waits_for_resubmission
                a_reset_drops_requests_that_were_not_resubmitted
                a_stop_waits_for_resubmissions_of_later_visits
                a_visit_is_bounded_in_bytes
                a_visit_is_bounded_in_pieces
                a_failed_resubmission_is_not_repeated
            }
            stops {
                stopping_waits_for_io_and_reports_the_index
                an_abandoned_queue_does_not_access_its_ring
                an_abandoned_queue_forgets_all_requests
                a_drain_event_is_sent_later_if_the_event_queue_is_full
                a_full_channel_delays_and_loses_nothing
                requests_that_wait_for_room_keep_their_order
                requests_end_in_any_order
                memory_outlives_the_io_that_uses_it
                a_new_view_causes_one_call
                a_batch_causes_one_call
                a_removed_device_fails_requests_and_is_released
            }
        }
    };
    (@ $device:ty, $($suite:ident { $($test:ident)* })*) => {
        $(mod $suite {
            $(#[test]
            fn $test() {
                crate::suites::$suite::$test::<$device>();
            })*
        })*
    };
}
