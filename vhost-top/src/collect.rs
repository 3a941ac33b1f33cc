//! Calls the methods of a server, and makes a sample of their answers.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::histogram::Histogram;
use crate::rpc::{Error, Rpc};
use crate::sample::{Controller, Io, Iterations, Reactors, Sample};

const VERSION: &str = "spdk_get_version";
const REACTORS: &str = "framework_get_reactors";
const ITERATIONS: &str = "vhost_get_reactor_turns";
const STATS: &str = Sample::STATS;
const CONTROLLERS: &str = "vhost_get_controllers";
const IOSTAT: &str = "bdev_get_iostat";
const CONFIG: &str = "framework_get_config";
const ENABLE_HISTOGRAM: &str = "bdev_enable_histogram";
const GET_HISTOGRAM: &str = "bdev_get_histogram";

/// Limit on the histograms that are read for a sample: each answer has tens of kilobytes.
const HISTOGRAMS_MAX: usize = 64;

/// How often the configuration is asked which histograms are enabled. The server logs an error for
/// each `bdev_get_histogram` of a disabled one.
const HISTOGRAMS_PERIOD: Duration = Duration::from_secs(10);

/// The shortest latency that a histogram which is enabled here tells from shorter ones. The default,
/// a microsecond, is longer than most requests of memory disks take.
const MIN_NS: u64 = 100;

/// A connection to a server, and what is known about the server.
#[derive(Debug)]
pub(crate) struct Collector {
    rpc: Rpc,
    version: String,
    /// Methods that the server does not have.
    missing: Vec<&'static str>,
    /// The bdevs whose histograms are enabled, and when the server was asked for them.
    histograms: Vec<String>,
    asked: Option<Instant>,
}

impl Collector {
    /// Connects, without waiting for an answer.
    pub(crate) fn connect(socket: &Path) -> Result<Self, Error> {
        let rpc = Rpc::connect(socket)?;
        let (version, missing, histograms) = (String::new(), vec![], vec![]);
        Ok(Self { rpc, version, missing, histograms, asked: None })
    }

    /// Takes a sample.
    pub(crate) fn sample(&mut self) -> Result<Sample, Error> {
        if self.version.is_empty() {
            #[derive(Deserialize)]
            struct Version {
                version: String,
            }
            let answer = self.rpc.call(VERSION, Value::Null)?;
            self.version = decode::<Version>(VERSION, answer)?.version;
        }
        let reactors = self.optional::<Reactors>(REACTORS, Value::Null)?.unwrap_or_default();
        let iterations =
            self.optional::<Vec<Iterations>>(ITERATIONS, Value::Null)?.unwrap_or_default();
        let controllers = match self.optional(STATS, Value::Null)? {
            Some(controllers) => controllers,
            None => self.plain_controllers()?,
        };
        let at = Instant::now();
        let histograms = self.read_histograms(&controllers)?;
        let (version, missing) = (self.version.clone(), self.missing.clone());
        Ok(Sample { at, version, reactors, iterations, controllers, histograms, missing })
    }

    /// Enables or disables the histogram of a bdev.
    pub(crate) fn enable_histogram(&mut self, bdev: &str, enable: bool) -> Result<(), Error> {
        let mut params = json!({"name": bdev, "enable": enable});
        if enable && !self.missing.contains(&STATS) {
            params["min_nsec"] = MIN_NS.into();
        }
        self.rpc.call(ENABLE_HISTOGRAM, params)?;
        self.asked = None;
        Ok(())
    }

    /// Restricts the longest poll iterations to those after now.
    pub(crate) fn reset_longest(&mut self) -> Result<(), Error> {
        self.rpc.call(ITERATIONS, json!({"reset": true})).map(drop)
    }

    /// Calls a method that the server may not have.
    fn optional<T: DeserializeOwned>(
        &mut self,
        method: &'static str,
        params: Value,
    ) -> Result<Option<T>, Error> {
        if self.missing.contains(&method) {
            return Ok(None);
        }
        match self.rpc.call(method, params) {
            Ok(answer) => decode(method, answer).map(Some),
            Err(error) if error.is_no_such_method() => {
                self.missing.push(method);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The controllers of SPDK's server, with the counters of their bdevs.
    fn plain_controllers(&mut self) -> Result<Vec<Controller>, Error> {
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Bdev {
            name: String,
            #[serde(flatten)]
            io: Io,
        }
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Iostat {
            bdevs: Vec<Bdev>,
        }
        let controllers = self.optional::<Vec<Controller>>(CONTROLLERS, Value::Null)?;
        let mut controllers = controllers.ok_or(Error::NotVhost(CONTROLLERS))?;
        let iostat = self.optional::<Iostat>(IOSTAT, Value::Null)?.unwrap_or_default();
        for controller in &mut controllers {
            let (mut io, names) = (Io::default(), controller.bdevs());
            let its = iostat.bdevs.iter().filter(|bdev| names.contains(&bdev.name.as_str()));
            its.for_each(|bdev| io.add(&bdev.io));
            controller.io = io;
        }
        Ok(controllers)
    }

    fn read_histograms(
        &mut self,
        controllers: &[Controller],
    ) -> Result<HashMap<String, Histogram>, Error> {
        if self.asked.is_none_or(|asked| asked.elapsed() >= HISTOGRAMS_PERIOD) {
            let config = self.optional(CONFIG, json!({"name": "bdev"}))?;
            self.histograms = enabled_histograms(&config.unwrap_or(Value::Null));
            self.asked = Some(Instant::now());
        }
        let served = |bdev: &String| controllers.iter().any(|c| c.bdev() == Some(bdev.as_str()));
        let names: Vec<String> =
            self.histograms.iter().filter(|b| served(b)).take(HISTOGRAMS_MAX).cloned().collect();
        let mut histograms = HashMap::new();
        for name in names {
            match self.rpc.call(GET_HISTOGRAM, json!({"name": name})) {
                Ok(answer) => {
                    histograms.extend(Histogram::parse(answer).map(|parsed| (name, parsed)));
                }
                // Another client has disabled it, or deleted the bdev.
                Err(error) if error.is_answer() => self.histograms.retain(|bdev| *bdev != name),
                Err(error) => return Err(error),
            }
        }
        Ok(histograms)
    }
}

fn decode<T: DeserializeOwned>(method: &str, answer: Value) -> Result<T, Error> {
    serde_json::from_value(answer)
        .map_err(|error| Error::Broken { method: method.to_owned(), cause: error.to_string() })
}

/// The bdevs whose histograms a configuration enables.
fn enabled_histograms(config: &Value) -> Vec<String> {
    let calls = config.as_array().map_or(&[][..], Vec::as_slice).iter();
    let enabled =
        calls.filter(|c| c["method"] == ENABLE_HISTOGRAM && c["params"]["enable"] == true);
    enabled.filter_map(|c| c["params"]["name"].as_str().map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// Answers calls until the client is gone; `None` means that the method does not exist.
    fn serve(listener: &UnixListener, answer: impl Fn(&str) -> Option<Value>) -> Vec<String> {
        let mut stream = listener.accept().unwrap().0;
        let mut called = vec![];
        let requests = serde_json::Deserializer::from_reader(stream.try_clone().unwrap());
        for request in requests.into_iter::<Value>() {
            let request = request.unwrap();
            let method = request["method"].as_str().unwrap();
            called.push(method.to_owned());
            let answer = match answer(method) {
                Some(result) => json!({"id": request["id"], "result": result}),
                None => json!({"id": request["id"], "error": {"code": -32601, "message": "no"}}),
            };
            stream.write_all(answer.to_string().as_bytes()).unwrap();
        }
        called
    }

    fn with_server<T>(
        name: &str,
        answer: impl Fn(&str) -> Option<Value> + Send + 'static,
        client: impl FnOnce(&mut Collector) -> T,
    ) -> (T, Vec<String>) {
        let file = format!("vhost-top-{name}-{}.sock", std::process::id());
        let path = std::env::temp_dir().join(file);
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || serve(&listener, answer));
        let mut collector = Collector::connect(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let result = client(&mut collector);
        drop(collector);
        (result, server.join().unwrap())
    }

    /// SPDK's server, which lacks the own methods.
    fn spdk(method: &str) -> Option<Value> {
        Some(match method {
            VERSION => json!({"version": "SPDK v26.05"}),
            REACTORS => json!({"tick_rate": 10, "pid": 5, "reactors": [{"lcore": 1, "busy": 2}]}),
            CONTROLLERS => json!([{"ctrlr": "a", "sessions": [{"id": 0, "started": true}],
                "backend_specific": {"block": {"bdev": "M"}}}, {"ctrlr": "s",
                "backend_specific": {"scsi": []}}, {"ctrlr": "t", "backend_specific": {"scsi": [
                {"scsi_dev_num": 0, "luns": [{"id": 0, "bdev_name": "M"}]},
                {"scsi_dev_num": 1, "luns": [{"id": 0, "bdev_name": "M"}]},
                {"scsi_dev_num": 7, "luns": [{"id": 0, "bdev_name": "N"}]}]}}]),
            IOSTAT => json!({"bdevs": [{"name": "M", "num_read_ops": 7, "io_error": {}},
                {"name": "N", "num_read_ops": 4, "num_write_ops": 1}]}),
            CONFIG => json!([{"method": ENABLE_HISTOGRAM, "params": {"name": "M", "enable": true}},
                {"method": ENABLE_HISTOGRAM, "params": {"name": "other", "enable": true}}]),
            GET_HISTOGRAM => json!({"histogram": "", "granularity": 7, "tsc_rate": 1}),
            _ => return None,
        })
    }

    #[test]
    fn spdks_server_shows_the_counters_of_bdevs() {
        let (samples, called) =
            with_server("spdk", spdk, |c| [c.sample().unwrap(), c.sample().unwrap()]);
        for sample in &samples {
            assert_eq!((sample.version.as_str(), sample.reactors.pid), ("SPDK v26.05", Some(5)));
            assert_eq!(sample.missing, [ITERATIONS, STATS]);
            let [a, s, t] = &sample.controllers[..] else { panic!("{sample:?}") };
            assert_eq!((a.io.reads, a.bdev(), s.bdev()), (7, Some("M"), None));
            assert_eq!((t.io.reads, t.io.writes, t.bdev()), (11, 1, None));
            assert_eq!((t.bdevs(), s.io), (vec!["M", "N"], Io::default()));
            assert_eq!(sample.histograms.keys().collect::<Vec<_>>(), ["M"]);
        }
        let calls = |method: &str| called.iter().filter(|m| *m == method).count();
        assert_eq!((calls(STATS), calls(VERSION), calls(CONFIG)), (1, 1, 1), "asked for once");
        assert_eq!(calls(GET_HISTOGRAM), 2, "of served bdevs only");
    }

    #[test]
    fn another_program_is_not_a_vhost_server() {
        let version = |method: &str| spdk(method).filter(|_| method == VERSION);
        let (sample, _) = with_server("other", version, Collector::sample);
        assert!(matches!(sample.unwrap_err(), Error::NotVhost(CONTROLLERS)));
    }

    #[test]
    fn a_change_of_histograms_is_seen_in_the_next_sample() {
        let all = |method: &str| {
            if method == ENABLE_HISTOGRAM { Some(json!(true)) } else { spdk(method) }
        };
        let ((), called) = with_server("histograms", all, |collector| {
            collector.sample().unwrap();
            collector.enable_histogram("M", false).unwrap();
            collector.sample().unwrap();
            assert!(collector.reset_longest().unwrap_err().is_no_such_method());
        });
        assert_eq!(called.iter().filter(|m| *m == CONFIG).count(), 2);
    }
}
