//! Provisional.
mod control;
mod dpdk;
use std::sync::Arc;
fn main() {
    tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).init();
    let cores = vec![1];
    let eal = dpdk::eal::EalStart::spawn(dpdk::eal::EalOptions {
        reactor_cores: cores.clone(),
        no_huge: true,
        ..Default::default()
    });
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let control = std::rc::Rc::new(
        control::Control::start(&cores, "/tmp/vh".into(), || {
            eal.wait().map(|i| eprintln!("{i:?}")).map_err(|e| e.to_string())
        })
        .unwrap(),
    );
    dpdk::transport::describe();
    let local = tokio::task::LocalSet::new();
    local.block_on(&rt, async move {
        let c = control.clone();
        tokio::task::spawn_local(async move { c.run().await });
        let m = bdev::Malloc::create(bdev::MallocOptions {
            name: "Malloc0".into(),
            num_blocks: 131072,
            block_size: 512,
            uuid: None
        })
        .unwrap();
        control
            .create_controller(vhost_blk::ControllerSpec {
                name: "vhost.0".into(),
                socket: control.socket_path("vhost.0"),
                disk: Arc::new(vhost_blk::config::Disk { bdev: m, read_only: false }),
                cores: None,
                packed_ring: false,
            })
            .await
            .unwrap();
        tokio::signal::ctrl_c().await.unwrap();
        control.shut_down().await;
    });
}
