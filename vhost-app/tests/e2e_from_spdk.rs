//! A front end that has negotiated with SPDK's vhost comes to this one with what it has.

mod harness;

use bench::{
    FrontEnd, GuestRam, Options, QueueOptions, RawConnection, Request, STATUS_OK,
    VhostUserProtocolFeatures,
};
use harness::Vhost;
use serde_json::json;

/// What SPDK offers for a malloc disk (seen on the wire).
const FEATURES: u64 = 0x1_5c00_7646;
const PROTOCOL_FEATURES: u64 = 0x1_1ebf;

const SET_FEATURES: u32 = 2;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
const SEND_RARP: u32 = 19;
const NET_SET_MTU: u32 = 20;
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;

fn start() -> Vhost {
    let vhost = Vhost::start(&[]);
    let disk = json!({"name": "M", "num_blocks": 16384, "block_size": 512});
    vhost.ok("bdev_malloc_create", disk);
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "c", "dev_name": "M"}));
    vhost
}

#[test]
fn it_asks_nothing_and_goes_on() {
    let vhost = start();
    let mut raw = RawConnection::connect(&vhost.socket("c")).unwrap();
    for (request, number) in [
        (SET_PROTOCOL_FEATURES, PROTOCOL_FEATURES),
        (SET_FEATURES, FEATURES),
        // Meant for a network device, and nothing to end a connection for.
        (SEND_RARP, 0),
        (NET_SET_MTU, 1500),
    ] {
        raw.send_message(request, VERSION | NEED_REPLY, &number.to_le_bytes(), &[]).unwrap();
        assert_eq!(raw.receive().unwrap().value(), Some(0), "request {request}");
    }
    raw.send_message(GET_QUEUE_NUM, VERSION, &[], &[]).unwrap();
    assert_eq!(raw.receive().unwrap().value(), Some(128));
    drop(raw);
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn it_works_and_comes_back_with_its_in_flight_area() {
    let vhost = start();
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let options = Options {
        features: FEATURES,
        protocol: VhostUserProtocolFeatures::from_bits_retain(PROTOCOL_FEATURES),
        inflight: true,
        ..Options::default()
    };
    let mut front_end = FrontEnd::connect(&vhost.socket("c"), ram, options).unwrap();
    assert_eq!(front_end.features(), FEATURES);
    assert_eq!(front_end.protocol_features().bits(), PROTOCOL_FEATURES);
    assert_eq!(front_end.config().unwrap().num_queues, 128);
    let mut queue = front_end.start_new(1, QueueOptions::default()).unwrap().remove(0);
    let buffer = queue.ring().ram().alloc(4096, 4096).unwrap();
    for _ in 0..3 {
        assert_eq!(queue.run(&Request::write(0, &[buffer])).unwrap().status, STATUS_OK);
        front_end.reconnect().unwrap();
        assert_eq!(queue.run(&Request::read(0, &[buffer])).unwrap().status, STATUS_OK);
    }
    front_end.disconnect().unwrap();
    drop(queue);
    assert_eq!(vhost.stop(), 0);
}
