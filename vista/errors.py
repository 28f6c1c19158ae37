"""Typed errors. Each message says what is wrong, where, and how to fix it. Messages and logs contain no passwords."""

from __future__ import annotations

import logging
import re
import shlex
import threading
from typing import Any

MAX_MESSAGE = 4_000
"""Longest message of an error, in characters: a value of a million characters in it must not fill a log."""


def shortened(text: str, limit: int, size: int | None = None) -> str:
    """The text, or `limit` characters of its start and end, if these with a note of what is missing are shorter.
    `size`: characters of the text before it was shortened for the first time; None if it was not."""
    left_out = (len(text) if size is None else size) - 2 * (limit // 2)
    ends = f"{text[: limit // 2]} … [{left_out} characters left out] … {text[-(limit // 2) :]}"
    return ends if len(ends) < len(text) else text


def shown(value: object, limit: int = 80) -> str:
    """A value as a message shows it: its `repr` without passwords, shortened."""
    text = repr(value)
    # Passwords are removed before the value is shortened, because the @ after one may be in the part that is left out.
    # The first cut is at a length that no password has, so that a value of millions of characters takes no time.
    return shortened(without_password(shortened(text, MAX_MESSAGE)), limit, len(text))


def key_word(key: str, value: str | list[str]) -> str:
    """A `key=value` word, as `compose_config` reads it."""
    text = f"[{','.join(map(_in_grammar, value))}]" if isinstance(value, list) else _in_grammar(value)
    return f"{key}={text}"


def shell_word(key: str, value: str | list[str]) -> str:
    """A `key=value` word of a command line, ready to paste into a shell."""
    word = key_word(key, value)
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def _in_grammar(text: str) -> str:
    """Text in Hydra's grammar, in quotes if it has other characters than those of words and formats."""
    if re.fullmatch(r"[\w./%:+@-]+( [\w./%:+@-]+)*", text, re.ASCII) and text != "null":
        return text
    # Backslashes count as such unless a quote follows.
    escaped = re.sub(r"\\+(?='|\Z)", lambda match: 2 * match[0], text).replace("'", "\\'")
    return f"'{escaped}'"


_STORE = re.compile(r"(rediss?:/+[^/:]*):(?!\S*:\s).*(?=@)", re.IGNORECASE | re.DOTALL)
"""Matches the start of a text that is a store URL (not an error that begins with one), up to the end of the password,
which may contain spaces. Group 1 is the part before the password."""
_USER = re.compile(r"(?<=[a-z0-9]):/+[^/:@\[\s]*:(?!\s)", re.IGNORECASE)
"""In a URL, what comes between the scheme and a password or a port."""
_PORT = re.compile(r"[0-9]{1,5}(?![^\s/?#:,;.)\]'\"])")
_END = re.compile(r"\s|\Z")
_END_OF_HOST = re.compile(r"[/?#\s]|\Z")
_QUERIED = re.compile(r"([?&][a-z_]{0,20}(?:password|passwd|pwd|token|secret|key)=)[^&#\s]*", re.IGNORECASE)


def without_password(text: str) -> str:
    """Remove the passwords from a URL, or from the URLs in a text, before it is shown, logged, or written.

    Passwords may contain characters that a URL must encode, such as a slash or a space. When in doubt, this removes too
    much. It runs in linear time, even on hostile input.
    """
    text = match[1] + text[match.end() :] if (match := _STORE.match(text)) is not None else text
    parts, kept, at, end = [], 0, -1, -1
    user = _USER.search(text)
    while user is not None:
        begin = user.end()
        at = at if at >= begin else text.find("@", begin)
        if at < 0:
            break
        end = end if end >= begin else next(_END.finditer(text, begin)).start()
        is_store = text[max(0, user.start() - 6) : user.start()].lower().endswith(("redis", "rediss"))
        past = begin
        if is_store and at < end:
            past = text.rfind("@", begin, end)
        elif at < (end_of_host := next(_END_OF_HOST.finditer(text, begin)).start()):
            past = text.rfind("@", begin, end_of_host)
        elif _PORT.match(text, begin) is None:
            past = text.rfind("@", at, next(_END.finditer(text, at)).start())
        if past > begin:
            parts.append(text[kept : begin - 1])
            kept = past
        user = _USER.search(text, max(begin - 1, kept))
    return _QUERIED.sub(r"\1", "".join(parts) + text[kept:])


class LogFormatter(logging.Formatter):
    """Removes URL passwords from log lines and tracebacks. Every log that vista writes uses it."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return _lines_without_password(super().format(record))

    def formatException(self, ei: Any) -> str:
        """A traceback as text. `ei`: as of `sys.exc_info`."""
        return _lines_without_password(super().formatException(ei))


def _lines_without_password(text: str) -> str:
    # One by one: an @ in a line of code is not the end of a password in another line.
    return "\n".join(map(without_password, text.split("\n")))


def log_to_stderr(level: int) -> None:
    """Write the messages of this process to stderr, from a level on, and what ends its threads unexpectedly."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _log_unexpected


def _log_unexpected(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_type is not SystemExit and ended.exc_value is not None:
        name = ended.thread.name if ended.thread is not None else "a thread"
        trace = ended.exc_type, ended.exc_value, ended.exc_traceback
        logging.getLogger(__name__).error("%s ended unexpectedly", name, exc_info=trace)


class VistaError(Exception):
    """Base of all errors that vista raises on purpose.

    The command line prints one as a single line. Its text has at most about `MAX_MESSAGE` characters, and no passwords
    of URLs.

    Remedy: read the message. It says what is wrong, where, and what to do. Catch this class to handle all of
    vista's own errors.
    """

    def __str__(self) -> str:
        return shortened(without_password(Exception.__str__(self)), MAX_MESSAGE)


class ConfigError(VistaError, ValueError):
    """A setting is unknown, has the wrong type, is out of range, or contradicts another setting.

    The command line exits with code 2.

    Remedy: change the key that the message names. `vista COMMAND --help all` lists the keys of a command, and `--cfg`
    prints the values that it would use.
    """


class DataError(VistaError, ValueError):
    """Source data cannot be used; the message names the file and, where there is one, the row, column and value.

    Nothing is written.

    Remedy: correct the source as the message says. `on_bad_rows=quarantine` sets bad rows aside instead of stopping at
    the first one.
    """


class TakenError(DataError):
    """The event log already holds the content of this source file.

    Remedy: leave the file out. If it was appended on purpose because it repeats old rows, send the new rows only: rows
    that come twice count twice.
    """


class LogBusyError(DataError):
    """Another process is writing the event log.

    Remedy: wait for the other process to end, then run the command again. Nothing is wrong with the data.
    """


class LogWriteError(DataError):
    """The files of an event log cannot be written, for example because the disk is full.

    Remedy: free space or correct the permissions, then run the command again. The log is as it was before.
    """


class MissingDependencyError(VistaError, ImportError):
    """An optional package is not installed.

    Remedy: run the command in the message, which installs the missing extra.
    """


class UnfitSetupError(VistaError):
    """`vista doctor` found something that does not work: a package, a disk, a model, a store, or a log.

    Remedy: do what each line of the diagnosis under "Broken" says, then run `vista doctor` again.
    """


class LogFormatError(VistaError):
    """An event log is missing, damaged, or in another format.

    Remedy: check the path. `vista log verify` lists all damaged files. Restore them from a backup, or prepare the log
    again from its sources.
    """


class UnknownUserError(VistaError, KeyError):
    """A user is not in the event log, or has no record in the store and `on_missing` is `raise`.

    Remedy: refresh the store if the user is new. An erased user never gets a record again. With `on_missing="empty"` or
    `on_missing="nan"`, a scorer accepts unknown users.
    """


class UnknownItemError(VistaError, KeyError):
    """An item is not in the model's vocabulary and `on_missing` is `raise`.

    Remedy: train on a newer log to add items. With `on_missing="empty"` or `on_missing="nan"`, a scorer accepts unknown
    items.
    """


class StreamError(VistaError):
    """A Kafka server cannot be reached, refuses the client, or has no such topic.

    Nothing is lost: a watch retries at its next check and continues after the newest message in the log.

    Remedy: check the address, the network, and the settings in `stream.client_file`, such as the password.
    """


class StreamOffsetError(StreamError):
    """The log's offsets do not fit the topic: events were lost, or it is not the topic that the log was made from.

    For example, the server deleted messages (retention) before the watch read them. The watch ends.

    Remedy: check the topic and the log. To accept the gap, run the watch once with `stream.reset_offsets=true`.
    """


class CheckpointError(VistaError):
    """A checkpoint or an exported model is missing, damaged, or does not fit its configuration.

    Remedy: pass the path of an exported model, which is `<run_dir>/best`. If the files are damaged, export or train the
    model again. To train without the old checkpoints, use another `run_dir` or `resume=false`.
    """


class AdapterError(VistaError):
    """An adapter is missing, damaged, of another format, or was trained for another model.

    Remedy: copy the file again, or train the adapter for this model with `vista adapt base=…`.
    """


class ExportError(VistaError):
    """A model cannot be exported, or its export does not give the scorer's scores. Nothing is written.

    Remedy: do what the message says. If scores differ, report the difference and the model's config.json.
    """


class PromotionError(VistaError):
    """A model does not become the champion, because a gate failed, or there is no earlier model to go back to.

    Remedy: train a better model, or promote with `force=true`, which the audit file records.
    """


class NonFiniteLossError(VistaError):
    """The loss, its gradients or the scores of a validation became infinite or NaN during training.

    The message names the users. A training batch is also saved, and the message says where.

    Remedy: lower `optim.learning_rate`, or look at the events of these users. Training can resume from the last
    checkpoint.
    """


class TrackingError(VistaError):
    """A tracker (MLflow, Weights & Biases, TensorBoard) does not answer, or lacks a part of a run.

    Nothing that was trained is lost: the run's own folder has everything.

    Remedy: check the address, the network, and the key of the tracker, then rerun the command: it only sends what is
    missing. With `tracking=none`, the run needs no tracker.
    """


class SweepError(VistaError):
    """Trials of a sweep have failed, or the folder holds another sweep.

    Remedy: read the reasons in the table. Correct or leave out the settings that fail, then rerun the command: finished
    trials are not trained again.
    """


class RankError(VistaError):
    """Another process of a torchrun job has ended, cannot be reached, or has different weights after the same steps.

    Remedy: read the message of the rank that ended first; torchrun names it. Then rerun the command to resume from the
    last checkpoint.
    """


class ItemIndexError(VistaError):
    """An index over item vectors is missing, damaged, belongs to another model, or cannot be written.

    Remedy: run `vista index model=…` for the model in service, then open the scorer with `index=…` and the folder that
    the command wrote. Scores and rankings of given candidates need no index.
    """


class ItemIndexMismatchError(ItemIndexError):
    """An index over item vectors belongs to a different model than the one in service.

    Remedy: run `vista index model=…` for the model in service. A scorer that is running keeps its model and its index
    until the new model has an index too.
    """


class StoreError(VistaError):
    """A summary store is missing, damaged, closed, or does not fit the log or the model.

    Remedy: follow the message. Some messages need more than they say:

    - `holds no published generation`: run a full `vista refresh`.
    - `instead of the name of a generation`, `which does not exist`: run `vista store rollback to=N` with one of the
      generations that the message lists.
    - `is truncated`, `structure of the database is damaged`: check the disk, run `vista store
      rollback`, and refresh in full.
    - `was made from other sources`: this is another log, or an older copy of it. Use the log that the store was made
      from, or refresh in full.
    - `users were erased here, but are still in`: erase these users in the source store too.
    - `reader slots are taken`: run fewer readers, or give some of them a copy of the store (`vista store copy`).
    - `was removed after the parent process opened it`: open the store again in the child process.
    """


class StoreClosedError(StoreError):
    """A store, or one of its generations, was closed.

    Remedy: open the store again.
    """


class UnfinishedError(StoreError):
    """A generation of a store was never finished, so no reader opens it; or it has expired on its server.

    Remedy: run the same refresh again; it resumes the unfinished generation. After an expiry, run a full refresh.
    """


class StoreWriteError(StoreError):
    """The files of a store cannot be written or read, for example because the disk is full.

    What the store held stays in service.

    Remedy: free space or correct the permissions, then rerun the command to resume.
    """


class StoreUnavailableError(StoreError):
    """The server of a remote store cannot be reached, does not answer in time, or refuses the password or a command.

    Remedy: check that the server is running, and check the host, the port, the password, the network, and the server's
    load. A reader keeps its generation and works again as soon as the server answers. Rerun an interrupted command to
    resume it.
    """


class StoreBusyError(StoreError):
    """A command tried to read a whole generation, but the generation changed during every attempt.

    Remedy: run the command again after the refresh or the erasure has ended. Nothing is wrong with the store.
    """


class RecordError(StoreError):
    """A stored record is damaged or cannot be stored; the message names the user.

    A record cannot be stored if its summary has values that are not finite or that the codec cannot represent.

    Remedy: run `vista store verify`. If records are damaged, run `vista store rollback` or refresh in full; other users
    stay in service. If summaries cannot be stored, look at the weights of the model and at the events of the user.
    """


class UserKeyError(StoreError, ValueError):
    """A user id cannot be a key of a store: it is too long, beyond int64, or neither an integer nor a string.

    Remedy: use integers or strings of at most 509 bytes of UTF-8 as user ids. Hash longer ids before `vista prepare`.
    """


class StoreLockedError(StoreError):
    """Another process is writing the store.

    Remedy: wait for the process that the message names, or end it; its finished batches are kept. Then run the same
    command again.
    """


class SummarizerMismatchError(StoreError):
    """The summarizer (stage 1) that wrote the store is not that of the model that reads it; the message names both.

    Remedy: open the store with the model that wrote it, or run a full `vista refresh` with this model.
    """


class RecordContentsError(StoreError):
    """The records of a store are of the model's summarizer, but lack something else that the model reads: longer tails,
    or features of events or users.

    Remedy: refresh the store with this model, as the message says. The service waits for that refresh.
    """


class OverloadedError(VistaError):
    """The maximum number of requests is already waiting.

    Remedy: send the request again after the time in the header Retry-After. If this persists, add workers or
    machines, or send fewer candidates.
    """


class UnknownModelError(VistaError):
    """A request names a model that the service does not have.

    Remedy: use one of the names in the message, which are those of the file of `vista serve models=…`.
    """


class ModelUnavailableError(VistaError):
    """The service could not open one of its models, for example because its folder is missing or its summaries are not
    published yet. Other models stay in service.

    Remedy: the log of the service has the cause. Correct it, and send the request again later: the service tries again
    after `reload_s`.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """Time until the service tries again."""


class DeadlineError(VistaError):
    """The service did not compute a request within the request's deadline.

    Remedy: send fewer candidates, or allow more time with `deadline_s`. If requests wait for others, add workers or
    machines.
    """


class BodyTooLargeError(VistaError):
    """A request has a larger body, or more users or candidates, than the service accepts.

    Remedy: send several requests, or raise the limit that the message names.
    """


class SlowBodyError(VistaError):
    """The body of a request did not arrive within the request's deadline, or its connection was closed before its end.

    Remedy: check the network between the client and the service, or raise `deadline_s`.
    """


class WorkerDiedError(VistaError):
    """A process that does part of the work died, and so did its replacements.

    Remedy: look for the cause in the system's log. Most often, there was too little memory. Then rerun the command to
    resume.
    """


class LeakageError(VistaError):
    """A summary or a model covers the events that it is asked to predict.

    Remedy: refresh another store with an earlier `until=`, or train with the `data.validation_from` that the message
    names.
    """
