//! A running machine: its serial port in both directions, and its end.

use std::{
    fmt,
    fs::{self, File},
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{self, Child, Command},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use super::bochs;
use crate::workspace;

/// How often a quiet serial port or a running emulator is looked at.
const POLL: Duration = Duration::from_millis(10);
/// How long the emulator may take to open its end of the serial port.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// How long an emulator may live on after the verdict, or after its serial port was closed.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// Output kept in memory; a guest that prints for ever costs no more.
const OUTPUT_BYTES_MAX: usize = 64 << 20;

/// Is given serial output as it comes, in pieces of any size.
pub type Sink = Box<dyn FnMut(&[u8]) + Send>;

/// A folder for one run's files.
///
/// It carries our process id: whoever is killed leaves a disk image behind, and the next run removes it.
pub fn folder() -> Result<TempDir> {
    let runs = workspace::cache_folder("runs")?;
    for entry in fs::read_dir(&runs)?.flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.split('-').next()?.parse::<u32>().ok());
        if owner.is_some_and(|id| !Path::new(&format!("/proc/{id}")).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    tempfile::Builder::new()
        .prefix(&format!("{}-", process::id()))
        .tempdir_in(&runs)
        .context("cannot make a folder for the run")
}

/// A program that is killed when the thread that started it ends, however that happens.
pub fn dying_with_us(program: &str) -> Command {
    if workspace::has_program("setpriv") {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", program]);
        command
    } else {
        Command::new(program)
    }
}

/// The host's end of COM1.
pub enum Port {
    /// The emulator writes to a file; nothing can be typed.
    File(PathBuf),
    /// The emulator connects to this port of localhost.
    Socket(TcpListener, u16),
}

impl Port {
    pub fn file(path: PathBuf) -> Result<Self> {
        // There at once, so that following it needs no second case.
        File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self::File(path))
    }

    pub fn listen() -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).context("cannot listen on localhost")?;
        let number = listener.local_addr()?.port();
        Ok(Self::Socket(listener, number))
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The line `umbra: exit N` was there.
    Verdict(u8),
    /// The emulator ended without it.
    Died,
    /// It was still running when its time was up.
    TimedOut,
    /// The person at the terminal ended it.
    HungUp,
}

/// What is left of a run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// `N` of `umbra: exit N`.
    pub exit_code: Option<u8>,
    /// The tick at which Bochs ended.
    pub ticks: Option<u64>,
    /// All serial output, carriage returns removed.
    pub output: String,
    /// The emulator's own log.
    pub emulator_log: String,
}

/// Why [`Running::wait_for`] gave up.
#[derive(Debug)]
pub enum WaitError {
    /// The text did not come in time. With the end of what came.
    TimedOut(String, String),
    /// The machine ended first. With the end of what came.
    Ended(String, String),
}

impl fmt::Display for WaitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TimedOut(text, tail) => {
                write!(f, "`{text}` did not come in time; the last output:\n{tail}")
            }
            Self::Ended(text, tail) => {
                write!(f, "the machine ended before `{text}` came; its last output:\n{tail}")
            }
        }
    }
}

impl std::error::Error for WaitError {}

#[derive(Default)]
struct Captured {
    /// Serial output without carriage returns.
    bytes: Vec<u8>,
    /// Nothing more will come.
    closed: bool,
}

#[derive(Default)]
struct Shared {
    captured: Mutex<Captured>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Captured> {
        self.captured.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, bytes: &[u8]) {
        let mut captured = self.lock();
        let room = OUTPUT_BYTES_MAX.saturating_sub(captured.bytes.len());
        captured.bytes.extend(bytes.iter().filter(|&&byte| byte != b'\r').take(room));
        self.changed.notify_all();
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }
}

/// A started machine. Dropping it kills the emulator.
pub struct Running {
    child: Arc<Mutex<Child>>,
    shared: Arc<Shared>,
    /// Where [`Running::wait_for`] goes on searching.
    cursor: usize,
    input: Option<TcpStream>,
    reader: Option<JoinHandle<()>>,
    folder: TempDir,
    log_name: &'static str,
}

impl Running {
    pub(super) fn new(
        mut command: Command,
        port: Port,
        folder: TempDir,
        log_name: &'static str,
        sinks: Vec<Sink>,
    ) -> Result<Self> {
        let child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        let mut running = Self {
            child: Arc::new(Mutex::new(child)),
            shared: Arc::default(),
            cursor: 0,
            input: None,
            reader: None,
            folder,
            log_name,
        };
        let source: Box<dyn Read + Send> = match port {
            Port::File(path) => Box::new(File::open(&path)?),
            Port::Socket(listener, _) => {
                let stream = running.accept(&listener)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(POLL))?;
                running.input = Some(stream.try_clone()?);
                Box::new(stream)
            }
        };
        let (shared, child) = (Arc::clone(&running.shared), Arc::clone(&running.child));
        running.reader = Some(thread::spawn(move || follow(source, &child, &shared, sinks)));
        Ok(running)
    }

    /// Waits for the emulator to open its serial port.
    fn accept(&self, listener: &TcpListener) -> Result<TcpStream> {
        listener.set_nonblocking(true)?;
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    return Ok(stream);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("the emulator's serial port"),
            }
            if self.has_ended() {
                bail!("the emulator ended at once:\n{}", self.emulator_log());
            }
            if Instant::now() > deadline {
                bail!("the emulator did not open its serial port:\n{}", self.emulator_log());
            }
            thread::sleep(POLL);
        }
    }

    /// Types these bytes on COM1. Only for a machine started with `typed`.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let input = self.input.as_mut().context("this machine was started without typed input")?;
        input.write_all(bytes).context("the machine's serial port is closed")
    }

    /// Another handle for typing, for a thread of its own.
    pub fn keyboard(&self) -> Result<TcpStream> {
        let input = self.input.as_ref().context("this machine was started without typed input")?;
        Ok(input.try_clone()?)
    }

    /// Waits until `text` is printed, and goes on from behind it at the next call: a text that came between two
    /// calls is not missed, and one match is not found twice.
    pub fn wait_for(&mut self, text: &str, timeout: Duration) -> Result<(), WaitError> {
        self.cursor = self.wait_from(self.cursor, text, timeout)?;
        Ok(())
    }

    /// Waits until `text` is printed at or behind byte `start` of the output; the byte behind the match. For
    /// following several guests whose lines come in any order.
    pub fn wait_from(&self, start: usize, text: &str, timeout: Duration) -> Result<usize, WaitError> {
        let deadline = Instant::now() + timeout;
        let mut searched = start;
        let mut captured = self.shared.lock();
        loop {
            let from = searched.min(captured.bytes.len());
            if let Some(at) = find(&captured.bytes[from..], text.as_bytes()) {
                return Ok(from + at + text.len());
            }
            // The match may begin in what is there and end in what comes.
            searched = captured.bytes.len().saturating_sub(text.len()).max(start);
            if captured.closed {
                return Err(WaitError::Ended(text.to_owned(), tail(&captured.bytes)));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(WaitError::TimedOut(text.to_owned(), tail(&captured.bytes)));
            }
            captured =
                self.shared.changed.wait_timeout(captured, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// All output so far, carriage returns removed.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().bytes).into_owned()
    }

    /// The number of bytes of output so far.
    pub fn output_bytes(&self) -> usize {
        self.shared.lock().bytes.len()
    }

    /// Whether the emulator has ended and all its output has been read.
    pub fn is_finished(&self) -> bool {
        self.shared.lock().closed
    }

    /// Whether `umbra: exit N` has been printed.
    pub fn verdict(&self) -> Option<u8> {
        verdict(&self.shared.lock().bytes)
    }

    /// Waits for the end, at most for `timeout`, then ends it.
    pub fn finish(self, timeout: Duration) -> Result<Outcome> {
        self.finish_unless(timeout, || false)
    }

    /// The same, and ends it as soon as `hung_up` says so.
    pub fn finish_unless(mut self, timeout: Duration, hung_up: impl Fn() -> bool) -> Result<Outcome> {
        let started = Instant::now();
        let mut verdict_at: Option<Instant> = None;
        let mut ending = End::Died;
        while !self.is_finished() {
            if self.verdict().is_some() {
                let since = *verdict_at.get_or_insert_with(Instant::now);
                if since.elapsed() > LAST_WORDS {
                    break;
                }
            }
            if started.elapsed() >= timeout {
                ending = End::TimedOut;
                break;
            }
            if hung_up() {
                ending = End::HungUp;
                break;
            }
            thread::sleep(POLL);
        }
        self.kill();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        let exit_code = self.verdict();
        let end = exit_code.map_or(ending, End::Verdict);
        let emulator_log = self.emulator_log();
        let ticks = bochs::last_tick(&emulator_log);
        Ok(Outcome { end, exit_code, ticks, output: self.output(), emulator_log })
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_ended(&self) -> bool {
        has_ended(&self.child)
    }

    /// Ends the emulator, which may have ended already: that it has written its log is worth a moment.
    fn kill(&mut self) {
        let deadline = Instant::now() + LAST_WORDS;
        while self.shared.lock().closed && !self.has_ended() && Instant::now() < deadline {
            thread::sleep(POLL);
        }
        let mut child = self.child();
        let _ = child.kill();
        let _ = child.wait();
    }

    fn emulator_log(&self) -> String {
        ["stderr.txt", self.log_name]
            .iter()
            .filter_map(|name| fs::read(self.folder.path().join(name)).ok())
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut child = self.child();
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn has_ended(child: &Mutex<Child>) -> bool {
    let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
    !matches!(child.try_wait(), Ok(None))
}

/// Copies the serial port's output until the emulator has ended and nothing is left.
fn follow(mut source: Box<dyn Read + Send>, child: &Mutex<Child>, shared: &Shared, mut sinks: Vec<Sink>) {
    let mut buffer = vec![0; 64 << 10];
    let mut last_look = false;
    loop {
        match source.read(&mut buffer) {
            Ok(0) if last_look => break,
            Ok(0) => {
                // The end of a file is where the emulator has not written yet; of a socket, that it has gone.
                last_look = has_ended(child);
                if !last_look {
                    thread::sleep(POLL);
                }
            }
            Ok(count) => {
                shared.push(&buffer[..count]);
                for sink in &mut sinks {
                    sink(&buffer[..count]);
                }
            }
            Err(error) => match error.kind() {
                ErrorKind::Interrupted => {}
                ErrorKind::WouldBlock | ErrorKind::TimedOut if !last_look => last_look = has_ended(child),
                _ => break,
            },
        }
    }
    drop(sinks);
    shared.close();
}

fn find(bytes: &[u8], text: &[u8]) -> Option<usize> {
    if text.is_empty() {
        return Some(0);
    }
    bytes.windows(text.len()).position(|window| window == text)
}

/// The last lines of some output.
fn tail(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}

/// `N` of the last whole line `umbra: exit N`. A guest cannot forge it: its lines carry its name.
fn verdict(output: &[u8]) -> Option<u8> {
    let last = output.iter().rposition(|&byte| byte == b'\n')?;
    output[..last].rsplit(|&byte| byte == b'\n').take(200).find_map(|line| {
        let code = line.strip_prefix(b"umbra: exit ")?;
        std::str::from_utf8(code).ok()?.trim().parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_is_a_whole_line() {
        assert_eq!(verdict(b"x\numbra: exit 0\n"), Some(0));
        assert_eq!(verdict(b"umbra: exit 3\nlater\n"), Some(3));
        assert_eq!(verdict(b"x\numbra: exit 1"), None);
        assert_eq!(verdict(b"[guest] umbra: exit 0\n"), None);
        assert_eq!(verdict(b"umbra: exit 1000\n"), None);
        assert_eq!(verdict(b""), None);
    }

    fn shell(script: &str, sinks: Vec<Sink>) -> Running {
        let folder = tempfile::tempdir().unwrap();
        let port = Port::file(folder.path().join("serial.txt")).unwrap();
        let mut command = dying_with_us("sh");
        command.args(["-c", script]).current_dir(folder.path());
        Running::new(command, port, folder, "log", sinks).unwrap()
    }

    #[test]
    fn output_is_followed_to_its_end() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let copy = Arc::clone(&seen);
        let sink: Sink = Box::new(move |bytes| copy.lock().unwrap().extend_from_slice(bytes));
        let mut running = shell(
            "printf 'one\\r\\n' >>serial.txt; sleep 0.1; printf 'two one\\numbra: exit 7\\n' >>serial.txt",
            vec![sink],
        );
        let patience = Duration::from_secs(20);
        running.wait_for("one", patience).unwrap();
        running.wait_for("one", patience).unwrap();
        assert!(matches!(running.wait_for("one", patience), Err(WaitError::Ended(..))));
        let outcome = running.finish(patience).unwrap();
        assert_eq!(outcome.end, End::Verdict(7));
        assert_eq!(outcome.output, "one\ntwo one\numbra: exit 7\n");
        assert_eq!(seen.lock().unwrap().as_slice(), b"one\r\ntwo one\numbra: exit 7\n");
    }

    #[test]
    fn a_silent_end_and_a_timeout_differ() {
        let died = shell("exit 0", vec![]).finish(Duration::from_secs(20)).unwrap();
        assert_eq!(died.end, End::Died);
        let hung = shell("echo hello >>serial.txt; exec sleep 60", vec![])
            .finish(Duration::from_millis(300))
            .unwrap();
        assert_eq!(hung.end, End::TimedOut);
        assert_eq!(hung.output, "hello\n");
    }

    #[test]
    fn a_verdict_ends_an_emulator_that_does_not() {
        let outcome = shell("echo 'umbra: exit 0' >>serial.txt; exec sleep 60", vec![])
            .finish(Duration::from_secs(50))
            .unwrap();
        assert_eq!(outcome.end, End::Verdict(0));
    }
}
