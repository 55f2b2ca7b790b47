// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The live view in a terminal: keys, signals, and the state of the terminal.
//!
//! The terminal is as before when the view ends, panics or is stopped by job control.

use std::io::{self, Write};
use std::pin::pin;
use std::time::Duration;

use crossterm::cursor::{Hide, MoveTo, Show};
use crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use crossterm::style::{Attribute, Print, SetAttribute};
use crossterm::terminal::{self, Clear, ClearType};
use crossterm::{execute, queue};
use rustix::process::{Signal, getpid, kill_current_process_group, kill_process};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::Instant;

use super::Source;
use super::rates::{Comparison, Interval};
use super::view::{Column, View};
use crate::error::{Error, Kind, Result};
use crate::sys::printable;

/// A wait for the daemon that is shown.
const WAIT_SHOWN: Duration = Duration::from_secs(1);
/// Lines above the table.
const HEAD: usize = 3;

/// What keys do.
pub(crate) const KEYS: &[(&str, &str)] = &[
    ("q, Ctrl-C", "Quit."),
    // The manual pages are rid of a last ">".
    ("> and <", "Sort by the column to the right or left."),
    ("D, U, I, R, W", "Sort by DEVICE, USER, IO/S, R/S, W/S."),
    ("A, P, T, E", "Sort by AVG_MS, P99_MS, UTIL%, ERRORS."),
    ("r", "Reverse the order."),
    ("i", "Hide or show devices without I/O."),
    ("/", "Show only devices with a text in name, user, image or state: Enter keeps it, Esc removes it."),
    ("Up, Down, PgUp, PgDn, Home", "Scroll."),
    ("h, ?", "List the keys; any other key returns to the devices."),
];

/// Shows intervals until the user quits, a signal ends the program, or the iterations are over.
pub(super) async fn show(
    view: View,
    source: &Source,
    mut comparison: Comparison,
    first: Interval,
    iterations: Option<u64>,
) -> Result<()> {
    let cannot = |error| Error::os(error, "cannot use the terminal").with_kind(Kind::Io);
    let watch = |kind| signal(kind).map_err(cannot);
    let (mut end, mut interrupt) = (watch(SignalKind::terminate())?, watch(SignalKind::interrupt())?);
    let mut hang_up = watch(SignalKind::hangup())?;
    let mut stop = watch(SignalKind::from_raw(libc::SIGTSTP))?;
    let mut go_on = watch(SignalKind::from_raw(libc::SIGCONT))?;
    let _screen = Screen::enter().map_err(cannot)?;
    let mut keys = read_keys();
    let mut live = Live { view, all: first, mode: Mode::Devices, top: 0, waiting: Duration::ZERO };
    let mut overdue = tokio::time::interval(WAIT_SHOWN);
    let mut at = Instant::now() + source.delay;
    let mut left = iterations.unwrap_or(u64::MAX);
    let mut reading = pin!(source.reading(at));
    loop {
        live.waiting = at.elapsed();
        if live.draw().is_err() {
            // The terminal is gone.
            return Ok(());
        }
        tokio::select! {
            // A terminal that goes sends SIGHUP and SIGCONT.
            biased;
            _ = hang_up.recv() => return Ok(()),
            _ = end.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = stop.recv() => {
                leave().map_err(cannot)?;
                // Returns when the program is continued.
                let _ = kill_process(getpid(), Signal::STOP);
                enter().map_err(cannot)?;
            }
            // A shell may have changed the terminal after a SIGSTOP.
            _ = go_on.recv() => {
                let raw = terminal::disable_raw_mode().and_then(|()| terminal::enable_raw_mode());
                raw.and_then(|()| execute!(io::stdout(), Clear(ClearType::All), Hide)).map_err(cannot)?;
            }
            // None: the terminal is gone, too.
            event = keys.recv() => match event {
                None => return Ok(()),
                Some(Event::Key(key)) if key.kind != KeyEventKind::Release => {
                    if !live.press(key) {
                        return Ok(());
                    }
                }
                Some(_) => {}
            },
            now = &mut reading => {
                live.all = comparison.next(now);
                left -= 1;
                if left == 0 {
                    return Ok(());
                }
                at = source.after(at);
                reading.set(source.reading(at));
            }
            _ = overdue.tick() => {}
        }
    }
}

/// Keys and changes of the size, from a thread that ends with the program.
fn read_keys() -> UnboundedReceiver<Event> {
    let (sender, receiver) = unbounded_channel();
    std::thread::spawn(move || {
        while let Ok(event) = crossterm::event::read()
            && sender.send(event).is_ok()
        {}
    });
    receiver
}

fn enter() -> io::Result<()> {
    terminal::enable_raw_mode()?;
    execute!(io::stdout(), terminal::EnterAlternateScreen, terminal::DisableLineWrap, Hide)
}

fn leave() -> io::Result<()> {
    let shown = execute!(io::stdout(), Show, terminal::EnableLineWrap, terminal::LeaveAlternateScreen);
    terminal::disable_raw_mode().and(shown)
}

/// Columns and rows of the terminal. crossterm would run tput where the kernel does not know.
fn size() -> io::Result<(usize, usize)> {
    let size = rustix::termios::tcgetwinsize(io::stdout())?;
    let known = |size: u16, default| if size == 0 { default } else { size.into() };
    Ok((known(size.ws_col, 80), known(size.ws_row, 24)))
}

/// The terminal while it is ours.
struct Screen;

impl Screen {
    fn enter() -> io::Result<Screen> {
        let message = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            // First, or the message would vanish with the view.
            let _ = leave();
            message(panic);
        }));
        let screen = Screen;
        enter().map(|()| screen)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Again after a panic, it would move the cursor into the message.
        if !std::thread::panicking() {
            let _ = leave();
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Mode {
    Devices,
    Help,
    /// The filter is being typed.
    Filter,
}

/// What is shown.
struct Live {
    view: View,
    all: Interval,
    mode: Mode,
    /// Devices above the visible ones.
    top: usize,
    /// How long the next reading is due.
    waiting: Duration,
}

impl Live {
    /// False: quit.
    fn press(&mut self, key: KeyEvent) -> bool {
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            match key.code {
                KeyCode::Char('c') => return false,
                // The signal reaches the whole job, also this program.
                KeyCode::Char('z') => drop(kill_current_process_group(Signal::TSTP)),
                _ => {}
            }
            return true;
        }
        match self.mode {
            Mode::Filter => self.type_filter(key.code),
            Mode::Help if key.code != KeyCode::Char('q') => self.mode = Mode::Devices,
            _ => return self.command(key.code),
        }
        true
    }

    fn type_filter(&mut self, key: KeyCode) {
        match key {
            KeyCode::Enter => self.mode = Mode::Devices,
            KeyCode::Esc => {
                self.view.filter.clear();
                self.mode = Mode::Devices;
            }
            KeyCode::Backspace => drop(self.view.filter.pop()),
            KeyCode::Char(c) => self.view.filter.push(c),
            _ => {}
        }
        self.top = 0;
    }

    fn command(&mut self, key: KeyCode) -> bool {
        let page = size().map_or(24, |(_, rows)| rows).saturating_sub(HEAD + 1).max(1);
        match key {
            KeyCode::Char('q') => return false,
            KeyCode::Char('h' | '?') => self.mode = Mode::Help,
            KeyCode::Char('/') => self.mode = Mode::Filter,
            KeyCode::Esc => self.view.filter.clear(),
            KeyCode::Char('i') => self.view.hide_idle ^= true,
            KeyCode::Char('r') => self.view.reverse ^= true,
            KeyCode::Char('<') => self.view.sort = self.view.sort.moved(-1),
            KeyCode::Char('>') => self.view.sort = self.view.sort.moved(1),
            KeyCode::Char(letter) => {
                if let Some(column) = column_of(letter) {
                    self.view.sort = column;
                }
            }
            // `draw` stops at the last device.
            KeyCode::Down => self.top = self.top.saturating_add(1),
            KeyCode::PageDown => self.top = self.top.saturating_add(page),
            KeyCode::Up => self.top = self.top.saturating_sub(1),
            KeyCode::PageUp => self.top = self.top.saturating_sub(page),
            KeyCode::Home => self.top = 0,
            _ => {}
        }
        true
    }

    fn draw(&mut self) -> io::Result<()> {
        let (columns, rows) = size()?;
        let lines = self.lines(rows);
        let mut out = io::stdout().lock();
        for (row, line) in lines.iter().take(rows).enumerate() {
            let text: String = line.chars().take(columns).collect();
            queue!(out, MoveTo(0, row as u16), Clear(ClearType::UntilNewLine))?;
            match row == HEAD && self.mode != Mode::Help {
                true => {
                    let heading = format!("{text:columns$}");
                    queue!(
                        out,
                        SetAttribute(Attribute::Reverse),
                        Print(heading),
                        SetAttribute(Attribute::Reset)
                    )?;
                }
                false => queue!(out, Print(text))?,
            }
        }
        if lines.len() < rows {
            queue!(out, MoveTo(0, lines.len() as u16), Clear(ClearType::FromCursorDown))?;
        }
        out.flush()
    }

    fn lines(&mut self, rows: usize) -> Vec<String> {
        let shown = self.view.select(&self.all);
        let mut lines = Vec::from(self.view.summary(&self.all, &shown));
        if self.mode == Mode::Help {
            lines.push(String::new());
            lines.extend(KEYS.iter().map(|(key, does)| format!("{key:28}{does}")));
            return lines;
        }
        lines.push(match self.mode {
            Mode::Filter => format!("filter: {}_", printable(&self.view.filter)),
            _ if self.waiting >= WAIT_SHOWN => {
                format!("waiting for the daemon for {} s", self.waiting.as_secs())
            }
            _ if self.all.problem.is_some() => "asking again in each interval".to_owned(),
            _ => String::new(),
        });
        let table = self.view.table(&shown);
        let visible = rows.saturating_sub(HEAD + 1);
        self.top = self.top.min(shown.devices.len().saturating_sub(visible));
        lines.extend(table.first().cloned());
        lines.extend(table.into_iter().skip(1 + self.top).take(visible));
        lines
    }
}

fn column_of(letter: char) -> Option<Column> {
    Some(match letter {
        'D' => Column::Device,
        'U' => Column::User,
        'I' => Column::Operations,
        'R' => Column::Reads,
        'W' => Column::Writes,
        'A' => Column::Average,
        'P' => Column::P99,
        'T' => Column::Utilisation,
        'E' => Column::Errors,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::rates::DeviceRates;
    use super::*;

    fn live(devices: u32) -> Live {
        let device =
            |number| DeviceRates { name: format!("a/loop{number}"), number, ..DeviceRates::default() };
        let all = Interval { devices: (0..devices).map(device).collect(), ..Interval::default() };
        let view = View { sort: Column::Device, reverse: false, filter: String::new(), hide_idle: false };
        Live { view, all, mode: Mode::Devices, top: 0, waiting: Duration::ZERO }
    }

    fn press(live: &mut Live, key: KeyCode) -> bool {
        live.press(KeyEvent::new(key, KeyModifiers::NONE))
    }

    #[test]
    fn scrolls_to_the_last_device_and_keeps_the_heading() {
        let mut live = live(10);
        let shown = |live: &mut Live| -> Vec<String> {
            let lines = live.lines(8);
            assert!(lines.len() <= 8 && lines[HEAD].starts_with("DEVICE"), "{lines:?}");
            lines[HEAD + 1..].iter().map(|line| line.split_whitespace().next().unwrap().to_owned()).collect()
        };
        assert_eq!(shown(&mut live), ["a/loop0", "a/loop1", "a/loop2", "a/loop3"]);
        press(&mut live, KeyCode::Down);
        assert_eq!(shown(&mut live)[0], "a/loop1");
        for _ in 0..20 {
            press(&mut live, KeyCode::Down);
        }
        assert_eq!(shown(&mut live), ["a/loop6", "a/loop7", "a/loop8", "a/loop9"]);
        press(&mut live, KeyCode::Up);
        assert_eq!(shown(&mut live)[0], "a/loop5");
        press(&mut live, KeyCode::Home);
        assert_eq!(shown(&mut live)[0], "a/loop0");
        live.all.devices.clear();
        live.top = 5;
        assert!(shown(&mut live).is_empty() && live.lines(0).len() <= HEAD + 1);
    }

    #[test]
    fn a_filter_takes_letters_that_are_keys_elsewhere() {
        let mut live = live(3);
        for key in "/q1".chars() {
            assert!(press(&mut live, KeyCode::Char(key)));
        }
        assert_eq!((live.lines(24).len(), live.view.filter.as_str()), (HEAD + 1, "q1"));
        press(&mut live, KeyCode::Esc);
        assert_eq!((live.lines(24).len(), live.view.filter.as_str()), (HEAD + 4, ""));
        assert!(!press(&mut live, KeyCode::Char('q')));
        assert!(!live.press(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)));
    }

    #[test]
    fn says_that_the_daemon_is_late_or_gone() {
        let mut live = live(1);
        live.waiting = Duration::from_secs(7);
        assert_eq!(live.lines(24)[2], "waiting for the daemon for 7 s");
        live.waiting = Duration::ZERO;
        live.all = Interval { problem: Some("cannot reach it".into()), ..Interval::default() };
        let lines = live.lines(24);
        assert!(lines[0].ends_with("no answer from the daemon"), "{lines:?}");
        assert_eq!(lines[1..3], ["cannot reach it", "asking again in each interval"]);
        press(&mut live, KeyCode::Char('h'));
        assert!(live.lines(24).last().unwrap().starts_with("h, ?"));
        assert!(!press(&mut live, KeyCode::Char('q')), "q quits from the help, too");
    }
}
