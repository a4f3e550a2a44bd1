//! A real browser without a window, told what to do over two pipes. Source of the protocol: the Chrome DevTools Protocol,
//! `--remote-debugging-pipe`: JSON messages that end in a zero byte, read from file descriptor 3 and written to 4.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use serde_json::{Value, json};

/// The program, by its name in Debian.
pub const PROGRAM: &str = "chromium";

/// A browser with one page open.
pub struct Browser {
    child: Child,
    to: File,
    from: BufReader<File>,
    number: u64,
    session: Option<String>,
    /// What the page said in its console, and exceptions in it.
    pub complaints: Vec<String>,
    _folder: tempfile::TempDir,
}

impl Browser {
    /// Starts one and opens the page in a file.
    pub fn open_file(path: &Path) -> Result<Self, Failed> {
        Browser::open(&format!("file://{}", path.canonicalize()?.display()), [1300, 1000])
    }

    /// Starts one with a window of this width and height and opens the page at an address.
    pub fn open(url: &str, [width, height]: [usize; 2]) -> Result<Self, Failed> {
        let folder = tempfile::tempdir()?;
        let pipes = [folder.path().join("to"), folder.path().join("from")];
        let made = Command::new("mkfifo").args(&pipes).status()?;
        assert!(made.success());
        let mut shell = Command::new("sh");
        shell
            .args(["-c", "exec \"$@\" 3<\"$0/to\" 4>\"$0/from\""])
            .arg(folder.path())
            .arg(PROGRAM);
        shell.args([
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--remote-debugging-pipe",
        ]);
        shell.arg(format!("--window-size={width},{height}"));
        shell.arg(format!("--user-data-dir={}", folder.path().join("profile").display()));
        shell.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = shell.spawn()?;
        // In the order in which the shell opens them.
        let to = OpenOptions::new().write(true).open(&pipes[0])?;
        let from = BufReader::new(File::open(&pipes[1])?);
        let mut browser = Browser {
            child,
            to,
            from,
            number: 0,
            session: None,
            complaints: Vec::new(),
            _folder: folder,
        };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"}))?;
        let attached = browser.call(
            "Target.attachToTarget",
            json!({"targetId": target["targetId"], "flatten": true}),
        )?;
        browser.session = attached["sessionId"].as_str().map(String::from);
        browser.call("Runtime.enable", json!({}))?;
        browser.call("Page.enable", json!({}))?;
        browser.call("Log.enable", json!({}))?;
        // Windows are not as narrow as screens can be.
        let screen = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        browser.call("Emulation.setDeviceMetricsOverride", screen)?;
        browser.call("Page.navigate", json!({"url": url}))?;
        browser.wait_for("document.readyState === 'complete'")?;
        Ok(browser)
    }

    fn call(&mut self, method: &str, params: Value) -> Result<Value, Failed> {
        self.number += 1;
        let number = self.number;
        let mut message = json!({"id": number, "method": method, "params": params});
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        self.to.write_all(message.to_string().as_bytes())?;
        self.to.write_all(&[0])?;
        loop {
            let mut bytes = Vec::new();
            if self.from.read_until(0, &mut bytes)? == 0 {
                return Err(format!("the browser has ended during {method}").into());
            }
            bytes.pop();
            let answer: Value = serde_json::from_slice(&bytes)?;
            match answer["method"].as_str() {
                Some("Runtime.exceptionThrown" | "Runtime.consoleAPICalled" | "Log.entryAdded") => {
                    self.complaints.push(answer["params"].to_string())
                }
                _ if answer["id"] == json!(number) => {
                    return match answer.get("error") {
                        Some(error) => Err(format!("{method}: {error}").into()),
                        None => Ok(answer["result"].clone()),
                    };
                }
                _ => {}
            }
        }
    }

    /// What an expression of the page's script gives.
    pub fn value(&mut self, expression: &str) -> Result<Value, Failed> {
        let result = self.call(
            "Runtime.evaluate",
            json!({"expression": expression, "returnByValue": true, "awaitPromise": true}),
        )?;
        match result.get("exceptionDetails") {
            Some(fault) => Err(format!("{expression}: {fault}").into()),
            None => Ok(result["result"]["value"].clone()),
        }
    }

    /// Waits until an expression is true.
    pub fn wait_for(&mut self, expression: &str) -> Result<(), Failed> {
        let started = Instant::now();
        while self.value(expression)? != json!(true) {
            if started.elapsed() > Duration::from_secs(30) {
                return Err(format!("{expression} does not become true").into());
            }
            std::thread::sleep(Duration::from_millis(30));
        }
        Ok(())
    }

    /// Clicks with the mouse into the middle of the element that a selector finds.
    pub fn click(&mut self, selector: &str) -> Result<(), Failed> {
        let element = format!("document.querySelector({})", json!(selector));
        let place = self.value(&format!(
            "{element}.scrollIntoView({{block: 'center', behavior: 'instant'}}), (b => [b.x + b.width / 2, b.y + b.height / 2])({element}.getBoundingClientRect())"
        ))?;
        for kind in ["mousePressed", "mouseReleased"] {
            let event = json!({"type": kind, "x": place[0], "y": place[1], "button": "left", "clickCount": 1});
            self.call("Input.dispatchMouseEvent", event)?;
        }
        Ok(())
    }

    /// Draws a line with the mouse from one place in the element that a selector finds to another, in shares of its sides.
    pub fn drag(&mut self, selector: &str, from: [f64; 2], to: [f64; 2]) -> Result<(), Failed> {
        let element = format!("document.querySelector({})", json!(selector));
        let place = self.value(&format!(
            "{element}.scrollIntoView({{block: 'center', behavior: 'instant'}}), (b => [b.x, b.y, b.width, b.height])({element}.getBoundingClientRect())"
        ))?;
        let number = |index: usize| place[index].as_f64().unwrap_or(0.0);
        for (kind, [x, y]) in [("mousePressed", from), ("mouseMoved", to), ("mouseReleased", to)] {
            let event = json!({"type": kind, "x": number(0) + x * number(2), "y": number(1) + y * number(3),
                               "button": "left", "buttons": 1, "clickCount": 1});
            self.call("Input.dispatchMouseEvent", event)?;
        }
        Ok(())
    }

    /// Presses a key, by its name, with Ctrl held or not.
    pub fn press(&mut self, key: &str, control: bool) -> Result<(), Failed> {
        for kind in ["rawKeyDown", "keyUp"] {
            let event = json!({"type": kind, "key": key, "code": key, "modifiers": if control { 2 } else { 0 }});
            self.call("Input.dispatchKeyEvent", event)?;
        }
        Ok(())
    }

    /// A picture of the page, as a PNG file in base64.
    pub fn screenshot(&mut self) -> Result<String, Failed> {
        let shot = self.call("Page.captureScreenshot", json!({"format": "png"}))?;
        Ok(shot["data"].as_str().unwrap_or_default().to_owned())
    }

    /// Loads the page again.
    pub fn reload(&mut self) -> Result<(), Failed> {
        self.call("Page.reload", json!({})).map(|_| ())
    }

    /// Types into what has the focus.
    pub fn type_text(&mut self, text: &str) -> Result<(), Failed> {
        self.call("Input.insertText", json!({"text": text})).map(|_| ())
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
