//! The connection to one rank: a thread that writes, and a reader that expects what the ranks' program says comes next.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::sync::mpsc::{self, Receiver, Sender};

use half::bf16;

use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;

/// What one lane's thread writes.
pub struct Outgoing {
    pub header: Header,
    pub tensor: Tensor,
    pub range: Range<usize>,
}

/// The connection to one rank.
pub struct Lane {
    /// The rank.
    pub peer: usize,
    reader: TcpStream,
    /// What is to be written.
    pub jobs: Sender<Outgoing>,
    /// What came of each of these, in their order.
    pub done: Receiver<io::Result<()>>,
}

impl Lane {
    pub fn new(peer: usize, stream: TcpStream) -> io::Result<Self> {
        let mut writer = stream.try_clone()?;
        let (jobs, queue) = mpsc::channel::<Outgoing>();
        let (report, done) = mpsc::channel();
        std::thread::spawn(move || {
            for Outgoing { header, tensor, range } in queue {
                let outcome = bytes(&tensor)
                    .map_err(|error| io::Error::other(error.to_string()))
                    .and_then(|bytes| {
                        writer.write_all(&header.0)?;
                        writer.write_all(&bytes[range])
                    });
                // The tensor is free before the operation has ended.
                drop(tensor);
                if report.send(outcome).is_err() {
                    return;
                }
            }
        });
        Ok(Lane {
            peer,
            reader: stream,
            jobs,
            done,
        })
    }

    pub fn receive(&mut self, expected: &Header, target: &mut [u8]) -> io::Result<()> {
        let mut header = Header([0; HEADER]);
        self.reader.read_exact(&mut header.0)?;
        if header != *expected {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("it sent {header} where {expected} was expected: the ranks' programs have come apart",),
            ));
        }
        self.reader.read_exact(target)
    }

    pub fn close(&self) {
        // What is closed already needs no closing.
        let _ = self.reader.shutdown(Shutdown::Both);
    }
}

const HEADER: usize = 32;

/// What a transfer belongs to: the operation's name (16 bytes), its number and the bytes that follow.
#[derive(Clone, PartialEq, Eq)]
pub struct Header([u8; HEADER]);

impl Header {
    pub fn new(name: &'static str, number: u64, bytes: usize) -> Self {
        let mut header = [0; HEADER];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[16..24].copy_from_slice(&number.to_le_bytes());
        header[24..].copy_from_slice(&(bytes as u64).to_le_bytes());
        Header(header)
    }
}

impl std::fmt::Display for Header {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        let name = String::from_utf8_lossy(&self.0[..16]);
        write!(
            f,
            "{} bytes of operation {} ({})",
            number(&self.0[24..]),
            number(&self.0[16..24]),
            crate::printable(name.trim_end_matches('\0'))
        )
    }
}

/// The bytes of a tensor on the CPU.
pub fn bytes(tensor: &Tensor) -> Result<&[u8]> {
    Ok(match tensor.dtype() {
        DType::F32 => bytemuck::cast_slice(tensor.as_slice::<f32>()?),
        DType::Bf16 => bytemuck::cast_slice(tensor.as_slice::<bf16>()?),
        DType::I32 => bytemuck::cast_slice(tensor.as_slice::<i32>()?),
        DType::U8 => tensor.as_slice::<u8>()?,
    })
}

/// The same for writing.
pub fn bytes_mut(tensor: &mut Tensor) -> Result<&mut [u8]> {
    Ok(match tensor.dtype() {
        DType::F32 => bytemuck::cast_slice_mut(tensor.as_mut_slice::<f32>()?),
        DType::Bf16 => bytemuck::cast_slice_mut(tensor.as_mut_slice::<bf16>()?),
        DType::I32 => bytemuck::cast_slice_mut(tensor.as_mut_slice::<i32>()?),
        DType::U8 => tensor.as_mut_slice::<u8>()?,
    })
}
