//! A person's terminal as the machine's keyboard and screen.

use std::{
    io::{self, IsTerminal, Read, Write},
    net::TcpStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use anyhow::Result;

/// Ctrl-]: the way out when the hypervisor no longer answers.
const HANG_UP: u8 = 0x1d;

/// Whether a person sits at both ends.
pub fn is_interactive() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// The terminal, every key passed on as it is. Dropping it gives the terminal back.
pub struct Raw {
    hung_up: Arc<AtomicBool>,
}

impl Raw {
    /// Sends keys to `keyboard` from now on.
    pub fn start(mut keyboard: TcpStream) -> Result<Self> {
        crossterm::terminal::enable_raw_mode()?;
        let hung_up = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&hung_up);
        // Never joined: it waits for a key, and ends with the process.
        thread::spawn(move || {
            let mut keys = [0; 256];
            while let Ok(count @ 1..) = io::stdin().lock().read(&mut keys) {
                let end = keys[..count].iter().position(|&key| key == HANG_UP);
                if keyboard.write_all(&keys[..end.unwrap_or(count)]).is_err() {
                    break;
                }
                if end.is_some() {
                    break;
                }
            }
            flag.store(true, Ordering::Relaxed);
        });
        Ok(Self { hung_up })
    }

    /// Whether the person pressed Ctrl-] or the terminal is gone.
    pub fn hung_up(&self) -> bool {
        self.hung_up.load(Ordering::Relaxed)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = crossterm::terminal::disable_raw_mode();
    }
}

/// Standard output in raw mode, where a line feed alone would not go back to the first column.
#[derive(Default)]
pub struct RawScreen {
    after_return: bool,
}

impl Write for RawScreen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut screen = Vec::with_capacity(bytes.len() + 16);
        for &byte in bytes {
            if byte == b'\n' && !self.after_return {
                screen.push(b'\r');
            }
            self.after_return = byte == b'\r';
            screen.push(byte);
        }
        io::stdout().lock().write_all(&screen)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().lock().flush()
    }
}
