"""The completion script for zsh."""

from __future__ import annotations

from vista.cli.completion_table import CompletedCommand, CompletionTable

_HEAD = """\
#compdef vista
# Completion of vista {version} for zsh, written by `vista completion zsh`.

# The keys of a command, and the values of one of its keys. A value of `<path>` stands for files.
_vista_table() {{
    case $1 in
{cases}
    esac
}}
"""
_BODY = r"""
_vista() {
    local command="" key=${PREFIX%%\=*}
    local -a keys options values
    case "${words[2]} ${words[3]}" in
    (@two_words@) (( CURRENT > 3 )) && command="${words[2]} ${words[3]}" ;;
    (*) case ${words[2]} in (@one_word@) (( CURRENT > 2 )) && command=${words[2]} ;; esac ;;
    esac
    _vista_table "$command" "$key"
    if [[ -n $command && ${words[CURRENT - 1]} == --config ]]; then
        _files
    elif [[ -n $command && $PREFIX == *=* ]]; then
        if [[ ${values[1]} == "<path>" ]]; then
            compset -P '*='
            compset -P '*[[,]'
            _files
        else
            compset -P '*='
            compadd -a values
        fi
    elif [[ -n $command ]]; then
        _describe -t keys key keys -S ''
        compadd -a options
    elif (( CURRENT == 2 )); then
        values=(
@first_words@
        )
        _describe -t commands command values
        compadd -- --help --version
    elif (( CURRENT == 3 )); then
        case ${words[2]} in
@groups@
        esac
        (( ${#values} )) && _describe -t commands command values
    fi
}

if [[ ${funcstack[1]} == _vista ]]; then
    _vista "$@"
else
    compdef _vista vista
fi
"""


def zsh_script(table: CompletionTable) -> str:
    """The script: a table of the commands' words with their summaries, and the function that completes."""
    names = list(table.commands)
    body = _BODY.replace("@two_words@", "|".join(f'"{name}"' for name in names if " " in name))
    body = body.replace("@one_word@", "|".join(name for name in names if " " not in name))
    body = body.replace("@first_words@", _array(table.first_words(), 12))
    groups = (
        f"        ({first}) values=(\n{_array(seconds, 12)}\n        ) ;;"
        for first, seconds in table.second_words().items()
    )
    body = body.replace("@groups@", "\n".join(groups))
    cases = "\n".join(_case(name, command) for name, command in table.commands.items())
    return _HEAD.format(version=table.version, cases=cases) + body


def _case(name: str, command: CompletedCommand) -> str:
    """Sets the keys and options of a command, and the values of the key $2."""
    keys = _array({f"{key.name}=": key.summary for key in command.keys}, 12)
    lines = [f'    ("{name}")', f"        keys=(\n{keys}\n        )", f"        options=({' '.join(command.words)})"]
    lines.append("        case $2 in")
    for key in command.keys:
        if values := " ".join(map(_quoted, key.words)):
            lines.append(f"        ({key.name}) values=({values}) ;;")
    return "\n".join([*lines, "        esac ;;"])


def _array(words: dict[str, str], indent: int) -> str:
    """Elements of an array for _describe: words with their summaries."""
    return "\n".join(" " * indent + _quoted(f"{word}:{summary}") for word, summary in words.items())


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
