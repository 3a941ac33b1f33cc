//! The server's side of the handshake: bytes of the client in, bytes for the client out.
//!
//! The source is the NBD project's protocol specification, "Fixed newstyle negotiation".

use nbd::protocol::{
    self as wire, OptionHeader, OptionReply, handshake_flag, info, option, option_reply,
    transmission,
};

use crate::properties::Properties;

/// The maximum length of the data of an option that is looked at. Longer data is skipped.
const OPTION_MAX: usize = 16 << 10;
/// The maximum length of the data of an option. A longer one ends the connection.
const SKIPPED_MAX: u32 = 32 << 20;
/// The maximum number of options of one client: each costs it a reply of the server.
const OPTIONS_MAX: u32 = 1000;

/// The id of the metadata context [`wire::allocation::CONTEXT`].
pub(crate) const ALLOCATION_ID: u32 = 1;
/// The payload that a client may send or ask for, in bytes.
pub(crate) const PAYLOAD_MAX: u32 = wire::PAYLOAD_DEFAULT;

/// What the client has chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chosen {
    /// Structured replies.
    pub(crate) structured: bool,
    /// The metadata context that shows allocation.
    pub(crate) allocation: bool,
}

/// The state of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// It needs more bytes.
    Going,
    /// It has ended. The bytes that follow are requests.
    Done(Chosen),
    /// The connection ends once the output is sent.
    Over,
}

/// A handshake with one client.
pub(crate) struct Negotiation<'a> {
    name: &'a str,
    properties: &'a Properties,
    /// The client's flags have arrived.
    greeted: bool,
    no_zeroes: bool,
    /// The bytes of a long option that are still to be skipped.
    skip: u32,
    options: u32,
    chosen: Chosen,
    /// Bytes for the client.
    pub(crate) output: Vec<u8>,
}

/// The answer to an option: a reply, or the end of the handshake.
enum Answer {
    /// A reply of this type without data.
    Reply(u32),
    /// A reply that is an error, with a text for people.
    Refusal(u32, &'static str),
    /// The option is acknowledged, and ends the handshake.
    Enter,
    /// As `Enter`, for a client that expects no acknowledgement.
    EnterSilently,
    /// The connection ends, after an acknowledgement.
    Leave,
    /// The connection ends.
    Abort,
}

impl<'a> Negotiation<'a> {
    /// Begins a handshake for the export of this name.
    pub(crate) fn new(name: &'a str, properties: &'a Properties) -> Self {
        let mut output = wire::INIT_MAGIC.to_be_bytes().to_vec();
        output.extend(wire::OPTION_MAGIC.to_be_bytes());
        let flags = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
        output.extend(flags.to_be_bytes());
        let (greeted, no_zeroes, skip, options) = (false, false, 0, 0);
        let chosen = Chosen::default();
        Self { name, properties, greeted, no_zeroes, skip, options, chosen, output }
    }

    /// Consumes bytes from the front of `input`.
    pub(crate) fn advance(&mut self, input: &mut Vec<u8>) -> Progress {
        loop {
            if self.skip > 0 {
                let n = input.len().min(self.skip as usize);
                input.drain(..n);
                self.skip -= u32::try_from(n).unwrap_or(self.skip);
                if self.skip > 0 {
                    return Progress::Going;
                }
            }
            if !self.greeted {
                let Some(flags) = input.first_chunk().copied().map(u32::from_be_bytes) else {
                    return Progress::Going;
                };
                input.drain(..4);
                self.greeted = true;
                self.no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
                let known = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
                if flags & !known != 0 {
                    return Progress::Over;
                }
                continue;
            }
            let Some(header) = input.first_chunk::<{ OptionHeader::SIZE }>() else {
                return Progress::Going;
            };
            let Some(header) = OptionHeader::decode(header) else { return Progress::Over };
            if header.len > SKIPPED_MAX || self.options == OPTIONS_MAX {
                return Progress::Over;
            }
            if header.len as usize > OPTION_MAX {
                self.options += 1;
                input.drain(..OptionHeader::SIZE);
                self.skip = header.len;
                self.reply(header.option, option_reply::ERR_TOO_BIG, b"the option is too long");
                continue;
            }
            let end = OptionHeader::SIZE + header.len as usize;
            if input.len() < end {
                return Progress::Going;
            }
            let message: Vec<u8> = input.drain(..end).collect();
            self.options += 1;
            let progress = self.take(header.option, &message[OptionHeader::SIZE..]);
            if progress != Progress::Going {
                return progress;
            }
        }
    }

    fn take(&mut self, option: u32, data: &[u8]) -> Progress {
        match self.answer(option, data) {
            Answer::Reply(kind) => self.reply(option, kind, &[]),
            Answer::Refusal(kind, text) => self.reply(option, kind, text.as_bytes()),
            Answer::Enter => {
                self.reply(option, option_reply::ACK, &[]);
                return Progress::Done(self.chosen);
            }
            Answer::EnterSilently => return Progress::Done(self.chosen),
            Answer::Leave => {
                self.reply(option, option_reply::ACK, &[]);
                return Progress::Over;
            }
            Answer::Abort => return Progress::Over,
        }
        Progress::Going
    }

    fn answer(&mut self, option: u32, data: &[u8]) -> Answer {
        let no_data = || Answer::Refusal(option_reply::ERR_INVALID, "the option takes no data");
        match option {
            option::EXPORT_NAME => self.export_name(data),
            option::ABORT => Answer::Leave,
            option::LIST if !data.is_empty() => no_data(),
            option::LIST => {
                let name = self.name.as_bytes();
                let len = u32::try_from(name.len()).unwrap_or(0);
                let entry = [&len.to_be_bytes(), name].concat();
                self.reply(option, option_reply::SERVER, &entry);
                Answer::Reply(option_reply::ACK)
            }
            option::INFO | option::GO => self.info(option, data),
            option::STRUCTURED_REPLY if !data.is_empty() => no_data(),
            option::STRUCTURED_REPLY => {
                self.chosen.structured = true;
                Answer::Reply(option_reply::ACK)
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(option, data),
            _ => Answer::Refusal(option_reply::ERR_UNSUP, "the server does not know the option"),
        }
    }

    /// The oldest way to choose an export: an error can only be told by closing the connection.
    fn export_name(&mut self, name: &[u8]) -> Answer {
        // A client that uses this option knows no block sizes.
        if !self.is_ours(name) || self.properties.block_size > 512 {
            return Answer::Abort;
        }
        self.output.extend(self.properties.size.to_be_bytes());
        self.output.extend(self.flags().to_be_bytes());
        if !self.no_zeroes {
            self.output.extend([0; 124]);
        }
        Answer::EnterSilently
    }

    fn info(&mut self, option: u32, data: &[u8]) -> Answer {
        let mut from = Fields(data);
        let parsed = (|| {
            let name = from.text()?;
            let count = usize::from(from.u16()?);
            let wanted: Vec<u16> = (0..count).map(|_| from.u16()).collect::<Option<_>>()?;
            from.0.is_empty().then_some((name, wanted))
        })();
        let Some((name, wanted)) = parsed else {
            return Answer::Refusal(option_reply::ERR_INVALID, "the option's data is invalid");
        };
        if !self.is_ours(name) {
            return Answer::Refusal(option_reply::ERR_UNKNOWN, "there is no export of this name");
        }
        let block_size = self.properties.block_size;
        if option == option::GO && block_size > 512 && !wanted.contains(&info::BLOCK_SIZE) {
            let text = "the export needs a client that respects block sizes";
            return Answer::Refusal(option_reply::ERR_BLOCK_SIZE_REQD, text);
        }
        let export = [
            &info::EXPORT.to_be_bytes()[..],
            &self.properties.size.to_be_bytes(),
            &self.flags().to_be_bytes(),
        ];
        self.reply(option, option_reply::INFO, &export.concat());
        if wanted.contains(&info::NAME) {
            let name = [&info::NAME.to_be_bytes(), self.name.as_bytes()].concat();
            self.reply(option, option_reply::INFO, &name);
        }
        if wanted.contains(&info::BLOCK_SIZE) {
            let sizes = [
                &info::BLOCK_SIZE.to_be_bytes()[..],
                &block_size.to_be_bytes(),
                &block_size.max(4096).to_be_bytes(),
                &PAYLOAD_MAX.to_be_bytes(),
            ];
            self.reply(option, option_reply::INFO, &sizes.concat());
        }
        if option == option::GO { Answer::Enter } else { Answer::Reply(option_reply::ACK) }
    }

    fn contexts(&mut self, option: u32, data: &[u8]) -> Answer {
        if !self.chosen.structured {
            let text = "metadata contexts need structured replies";
            return Answer::Refusal(option_reply::ERR_INVALID, text);
        }
        let mut from = Fields(data);
        let parsed = (|| {
            let name = from.text()?;
            let count = from.u32()?;
            let mut queries = vec![];
            for _ in 0..count {
                queries.push(from.text()?);
            }
            from.0.is_empty().then_some((name, queries))
        })();
        let sets = option == option::SET_META_CONTEXT;
        if sets {
            self.chosen.allocation = false;
        }
        let Some((name, queries)) = parsed else {
            return Answer::Refusal(option_reply::ERR_INVALID, "the option's data is invalid");
        };
        if !self.is_ours(name) {
            return Answer::Refusal(option_reply::ERR_UNKNOWN, "there is no export of this name");
        }
        let context = wire::allocation::CONTEXT.as_bytes();
        // A list without queries, or one of a whole namespace, asks for all contexts.
        let all = !sets && (queries.is_empty() || queries.contains(&&b"base:"[..]));
        if all || queries.contains(&context) {
            self.chosen.allocation |= sets;
            let id = if sets { ALLOCATION_ID } else { 0 };
            let reply = [&id.to_be_bytes(), context].concat();
            self.reply(option, option_reply::META_CONTEXT, &reply);
        }
        Answer::Reply(option_reply::ACK)
    }

    /// Returns whether a client means this export. The empty name is the default export.
    fn is_ours(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }

    fn flags(&self) -> u16 {
        // A read has one chunk in any case.
        let of_client = if self.chosen.structured { transmission::SEND_DF } else { 0 };
        // A flush of a bdev covers the completed writes of all channels.
        self.properties.flags() | transmission::CAN_MULTI_CONN | of_client
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        // Each reply is far shorter than 4 GiB.
        let len = u32::try_from(data.len()).unwrap_or(0);
        self.output.extend(OptionReply { option, kind, len }.encode());
        self.output.extend(data);
    }
}

/// Takes fields from the front of an option's data.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn u16(&mut self) -> Option<u16> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u16::from_be_bytes(*field))
    }

    fn u32(&mut self) -> Option<u32> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_be_bytes(*field))
    }

    /// A length, and as many bytes.
    fn text(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.u32()?).ok().filter(|len| *len <= wire::STRING_MAX)?;
        let (text, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROPERTIES: Properties = Properties {
        size: 1 << 20,
        block_size: 512,
        read_only: false,
        flush: true,
        unmap: false,
        write_zeroes: true,
    };

    fn option(option: u32, data: &[u8]) -> Vec<u8> {
        let header = OptionHeader { option, len: data.len().try_into().unwrap() };
        [&header.encode()[..], data].concat()
    }

    fn text(bytes: &[u8]) -> Vec<u8> {
        [&u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat()
    }

    fn flags() -> Vec<u8> {
        3_u32.to_be_bytes().to_vec()
    }

    /// Feeds bytes in pieces of `piece`, and returns the output behind the greeting.
    fn talk(properties: &Properties, bytes: &[u8], piece: usize) -> (Progress, Vec<u8>, Vec<u8>) {
        let mut negotiation = Negotiation::new("disk", properties);
        let mut input = vec![];
        let mut pieces = bytes.chunks(piece);
        loop {
            let progress = negotiation.advance(&mut input);
            if progress == Progress::Going
                && let Some(piece) = pieces.next()
            {
                input.extend_from_slice(piece);
                continue;
            }
            input.extend(pieces.flatten());
            return (progress, negotiation.output.split_off(18), input);
        }
    }

    fn kinds(mut output: &[u8]) -> Vec<(u32, u32)> {
        let mut kinds = vec![];
        while let Some(reply) = output.first_chunk().and_then(OptionReply::decode) {
            kinds.push((reply.option, reply.kind));
            output = &output[OptionReply::SIZE + reply.len as usize..];
        }
        assert!(output.is_empty());
        kinds
    }

    #[test]
    fn a_handshake_gives_the_same_answers_however_its_bytes_arrive() {
        let wanted = [&text(b"disk")[..], &[0, 2, 0, 3, 0, 1]].concat();
        let queries = [&text(b"")[..], &1_u32.to_be_bytes(), &text(b"base:allocation")].concat();
        let bytes = [
            flags(),
            option(option::STRUCTURED_REPLY, &[]),
            option(option::LIST, &[]),
            option(option::SET_META_CONTEXT, &queries),
            option(option::STARTTLS, &[]),
            option(99, &[0; 20_000]),
            option(option::INFO, &[&text(b"other")[..], &[0, 0]].concat()),
            option(option::GO, &wanted),
            b"request".to_vec(),
        ]
        .concat();
        let whole = talk(&PROPERTIES, &bytes, bytes.len());
        assert_eq!(whole.0, Progress::Done(Chosen { structured: true, allocation: true }));
        assert_eq!(whole.2, b"request");
        use option_reply::{ACK, ERR_TOO_BIG, ERR_UNKNOWN, ERR_UNSUP, INFO, META_CONTEXT, SERVER};
        let expected = [
            (option::STRUCTURED_REPLY, ACK),
            (option::LIST, SERVER),
            (option::LIST, ACK),
            (option::SET_META_CONTEXT, META_CONTEXT),
            (option::SET_META_CONTEXT, ACK),
            (option::STARTTLS, ERR_UNSUP),
            (99, ERR_TOO_BIG),
            (option::INFO, ERR_UNKNOWN),
            (option::GO, INFO),
            (option::GO, INFO),
            (option::GO, INFO),
            (option::GO, ACK),
        ];
        assert_eq!(kinds(&whole.1), expected);
        for piece in [1, 2, 3, 7, 16, 1000] {
            assert_eq!(talk(&PROPERTIES, &bytes, piece), whole, "{piece}");
        }
    }

    #[test]
    fn the_old_way_to_choose_an_export_works() {
        let bytes = [0_u32.to_be_bytes().to_vec(), option(option::EXPORT_NAME, b"")].concat();
        let (progress, output, _) = talk(&PROPERTIES, &bytes, 1000);
        assert_eq!((progress, output.len()), (Progress::Done(Chosen::default()), 8 + 2 + 124));
        let bytes = [flags(), option(option::EXPORT_NAME, b"other")].concat();
        assert_eq!(talk(&PROPERTIES, &bytes, 1000).0, Progress::Over);
    }

    #[test]
    fn invalid_options_are_refused_and_end_nothing() {
        let meta = [&text(b"")[..], &u32::MAX.to_be_bytes()].concat();
        let invalid = [
            option(option::GO, &[0, 0, 0, 9]),
            option(option::GO, &[&text(b"")[..], &[0xff, 0xff]].concat()),
            option(option::LIST, &[1]),
            option(option::STRUCTURED_REPLY, &[1]),
            option(option::SET_META_CONTEXT, &meta),
        ];
        for one in invalid {
            let bytes = [flags(), one].concat();
            let (progress, output, _) = talk(&PROPERTIES, &bytes, 1000);
            assert_eq!(progress, Progress::Going);
            assert_eq!(kinds(&output)[0].1, option_reply::ERR_INVALID);
        }
    }

    #[test]
    fn a_client_that_ignores_block_sizes_is_refused_if_they_matter() {
        let large = Properties { block_size: 4096, ..PROPERTIES };
        let go = |wanted: &[u8]| {
            [flags(), option(option::GO, &[&text(b"")[..], wanted].concat())].concat()
        };
        let (progress, output, _) = talk(&large, &go(&[0, 0]), 1000);
        assert_eq!(progress, Progress::Going);
        assert_eq!(kinds(&output)[0].1, option_reply::ERR_BLOCK_SIZE_REQD);
        assert!(matches!(talk(&large, &go(&[0, 1, 0, 3]), 1000).0, Progress::Done(_)));
        let old = [flags(), option(option::EXPORT_NAME, b"")].concat();
        assert_eq!(talk(&large, &old, 1000).0, Progress::Over);
    }

    #[test]
    fn a_client_that_violates_the_protocol_is_disconnected() {
        let long = OptionHeader { option: 1, len: u32::MAX }.encode();
        let many = option(option::LIST, &[]).repeat(1001);
        let many_long = option(99, &[0; 20_000]).repeat(1001);
        for bytes in [
            [0xff; 4].to_vec(),
            [&flags()[..], &[0; 16]].concat(),
            [&flags()[..], &long].concat(),
            [&flags()[..], &many].concat(),
            [&flags()[..], &many_long].concat(),
            [flags(), option(option::ABORT, &[])].concat(),
        ] {
            assert_eq!(talk(&PROPERTIES, &bytes, 1 << 20).0, Progress::Over);
        }
    }
}
