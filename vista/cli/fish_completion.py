"""The completion script for fish."""

from __future__ import annotations

from vista.cli.completion_table import CompletedCommand, CompletionTable

_HEAD = """\
# Completion of vista {version} for fish, written by `vista completion fish`.

# Prints the keys of a command with their summaries, or the values of one of its keys.
# A value of `<path>` stands for files.
function __vista_table
    switch $argv[1]
{cases}
    end
end
"""
_BODY = r"""
function __vista_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l command ''
    switch "$words[2] $words[3]"
        case @two_words@
            set command "$words[2] $words[3]"
        case '*'
            switch "$words[2]"
                case @one_word@
                    set command $words[2]
            end
    end
    if test -n "$command" -a "$words[-1]" = --config
        __fish_complete_path $current
    else if test -n "$command"; and string match -q '*=*' -- $current
        set -l key (string replace -r '=.*' '' -- $current)
        set -l values (__vista_table $command $key)
        if test "$values" = '<path>'
            set -l start (string replace -r '(.*[=\[,]).*' '$1' -- $current)
            set -l rest (string replace -r '.*[=\[,]' '' -- $current)
            for path in (__fish_complete_path $rest)
                echo $start$path
            end
        else if test -n "$values"
            printf '%s\n' $key=$values
        end
    else if test -n "$command"
        __vista_table $command
    else if test (count $words) -eq 1
        printf '%s\t%s\n' @first_words@
        printf '%s\n' --help --version
    else if test (count $words) -eq 2
        switch $words[2]
@groups@
        end
    end
end

complete -c vista -f -a '(__vista_complete)'
"""


def fish_script(table: CompletionTable) -> str:
    """The script: a table of the commands' words with their summaries, and the function that completes."""
    names = list(table.commands)
    body = _BODY.replace("@two_words@", " ".join(_quoted(name) for name in names if " " in name))
    body = body.replace("@one_word@", " ".join(name for name in names if " " not in name))
    body = body.replace("@first_words@", _pairs(table.first_words()))
    groups = (
        f"            case {first}\n                printf '%s\\t%s\\n' {_pairs(seconds)}"
        for first, seconds in table.second_words().items()
    )
    body = body.replace("@groups@", "\n".join(groups))
    cases = "\n".join(_case(name, command) for name, command in table.commands.items())
    return _HEAD.format(version=table.version, cases=cases) + body


def _case(name: str, command: CompletedCommand) -> str:
    """Prints the values of the key $argv[2] of a command, or without one its keys and options."""
    lines = [f"        case {_quoted(name)}", '            switch "$argv[2]"']
    for key in command.keys:
        if values := " ".join(map(_quoted, key.words)):
            lines.append(f"                case {key.name}\n                    printf '%s\\n' {values}")
    pairs = _pairs({f"{key.name}=": key.summary for key in command.keys})
    lines += [
        "                case ''",
        f"                    printf '%s\\t%s\\n' {pairs}",
        f"                    printf '%s\\n' {' '.join(command.words)}",
        "            end",
    ]
    return "\n".join(lines)


def _pairs(words: dict[str, str]) -> str:
    return " ".join(f"{_quoted(word)} {_quoted(summary)}" for word, summary in words.items())


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
