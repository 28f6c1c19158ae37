"""Completion with Tab: the scripts for the shells, and the words that they offer.

The scripts know nothing of vista. They run `vista completion --words WORD ...` with the words after `vista` up to the
cursor. It imports neither torch nor polars, and prints one candidate per line: the whole word, then a tab and a
summary. A space at the end of the word means that another word can follow.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from vista.cli.command_table import COMMANDS
from vista.config import CompletionConfig
from vista.config.checks import Shell
from vista.config.composition import ConfigKey, ConfigKeys, groups_of, options_of

# bash 3.2 (macOS) and later. Readline replaces only what follows the last of its word breaks, which do not count after
# a quote, so what comes before is cut from each candidate.
_BASH = r"""
_vista_complete() {
    local line=${COMP_LINE:0:COMP_POINT} current prefix word quote=""
    local IFS=$' \t\n'
    local -a words
    read -r -a words <<< "$line"
    [[ $line == *[![:space:]] ]] || words+=("")
    current=${words[${#words[@]} - 1]}
    case $current in
    [\'\"]*) quote=${current:0:1} current=${current//${current:0:1}/} ;;
    esac
    words[${#words[@]} - 1]=$current
    prefix=${current%"${current##*["${COMP_WORDBREAKS//[^=:]/}"]}"}
    [[ $COMP_WORDBREAKS == *[=:]* && -z $quote ]] || prefix=""
    COMPREPLY=()
    while IFS= read -r word; do
        word=${word%%$'\t'*}
        [[ -z $quote ]] || word=${word% }
        COMPREPLY+=("${word#"$prefix"}")
    done < <("${words[0]/#\~/$HOME}" completion --words "${words[@]:1}" 2> /dev/null)
}

complete -o nospace -F _vista_complete vista
"""
_ZSH = r"""
_vista() {
    local line word
    local -a before finished unfinished
    before=("${(@Q)words[2,CURRENT-1]}")
    for line in "${(@f)$(${(Q)~words[1]} completion --words "${before[@]}" "${(Q)PREFIX}" 2> /dev/null)}"; do
        word=${${line%%$'\t'*}//:/\\:}
        case $word in
        ('') ;;
        (*' ') finished+=("${word% }:${line#*$'\t'}") ;;
        (*) unfinished+=("$word:${line#*$'\t'}") ;;
        esac
    done
    _describe -t words word finished -- unfinished -S ''
}

if [[ ${funcstack[1]} == _vista ]]; then
    _vista "$@"
else
    compdef _vista vista
fi
"""
_FISH = r"""
function __vista_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct | string replace -r '^[\'"]' '')
    $words[1] completion --words $words[2..-1] "$current" 2> /dev/null | string replace ' '\t \t
end

complete -c vista -f -a '(__vista_complete)'
"""
_SCRIPTS = {Shell.bash: _BASH, Shell.zsh: f"#compdef vista{_ZSH}", Shell.fish: _FISH}
_OPTIONS = ("--cfg", "--config", "--quiet", "--help")
_PATH = re.compile(r"\b([Ff]olders?|[Ff]iles?|[Pp]aths?)\b")
_SENTENCE = re.compile(r"^(.+?[^.]\.)\s+[A-Z`].*", re.DOTALL)
"""A sentence and what follows it."""


def run_completion(config: CompletionConfig) -> str:
    """`vista completion`: the script of a shell."""
    return _SCRIPTS[config.shell].strip()


def candidates(words: Sequence[str]) -> str:
    """`vista completion --words`: the lines for the last of these words, which may be empty."""
    *before, current = words
    found: dict[str, str] = {}
    for word, summary in _candidates(before, current):
        if word.startswith(current):
            found.setdefault(word, summary)
    return "\n".join(f"{word}\t{summary}" for word, summary in found.items())


def _candidates(before: list[str], current: str) -> Iterator[tuple[str, str]]:
    """Words that can follow the words `before`, with their summaries. Values and files depend on the word `current`."""
    for name, command in COMMANDS.items() if len(before) <= 1 else ():
        first, *second = name.split()
        if not before:
            others = [other.partition(" ")[2] for other in COMMANDS if other.startswith(f"{first} ")]
            yield f"{first} ", ", ".join(others) if second else command.summary
        elif before == [first]:
            yield from ((f"{word} ", command.summary) for word in second)
    named = next((name for name in (" ".join(before[:2]), *before[:1]) if name in COMMANDS), None)
    if named is None:
        yield from [("--help ", "")] * (len(before) <= 1) + [("--version ", "")] * (not before)
        return
    keys, groups = ConfigKeys.of(COMMANDS[named].schema).keys, groups_of(named)
    key, equals, value = current.partition("=")
    if before[-1] == "--config":
        yield from _files("", current)
    elif equals and key in groups:
        yield from ((f"{key}={option} ", summary) for option, summary in options_of(key).items())
    elif equals and key in keys:
        yield from ((f"{key}={one} ", "") for one in _values(keys[key]))
        if _is_path(keys[key]):
            path = re.split(r"[\[,]", value)[-1]
            yield from _files(current.removesuffix(path), path)
    else:
        yield from ((f"{group}=", f"Options of the group {group}") for group in groups)
        yield from ((f"{one.name}=", _SENTENCE.sub(r"\1", one.doc)) for one in keys.values())
        positional = COMMANDS[named].positional
        words = [*(_values(keys[positional]) if positional else []), *_OPTIONS]
        yield from ((f"{word} ", "") for word in words)
        if positional and _is_path(keys[positional]):
            yield from _files("", current)


def _is_path(key: ConfigKey) -> bool:
    """Whether the values of a key are files or folders."""
    return key.is_text and _PATH.search(key.doc) is not None


def _values(key: ConfigKey) -> list[str]:
    """All values of a key, if there are few; otherwise none."""
    plain = key.type_text.removesuffix(" or null")
    values = plain.split("|") if key.choices else ["true", "false"] if plain == "bool" else []
    return [*values, "null"] if values and plain != key.type_text else values


def _files(start: str, path: str) -> Iterator[tuple[str, str]]:
    """Files and folders, which `path` begins. Without a space: a list can continue after each of them."""
    folder, name = os.path.split(path)
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if name.startswith(".") or not entry.name.startswith("."):
            yield f"{start}{path.removesuffix(name)}{entry.name}{'/' * entry.is_dir()}", ""
