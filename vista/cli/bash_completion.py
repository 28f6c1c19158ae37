"""The completion script for bash. It starts no process, and works with bash 3.2 (macOS) and later."""

from __future__ import annotations

from vista.cli.completion_table import CompletedCommand, CompletionTable

_HEAD = """\
# Completion of vista {version} for bash, written by `vista completion bash`.

# The keys of a command, and the values of one of its keys. A value of `<path>` stands for files.
_vista_table() {{
    keys="" values=""
    case $1 in
{cases}
    esac
}}
"""
_BODY = r"""
_vista_complete() {
    local line=${COMP_LINE:0:COMP_POINT} current="" command="" keys="" values="" quote=""
    local IFS=$' \t\n' entry prefix start
    local -a words candidates
    read -r -a words <<< "$line"
    if [[ $line == *[![:space:]] ]]; then
        current=${words[${#words[@]} - 1]}
        unset "words[${#words[@]} - 1]"
    fi
    case $current in
    [\'\"]*) quote=${current:0:1} current=${current:1} ;;
    esac
    case "${words[1]} ${words[2]}" in
@two_words@) command="${words[1]} ${words[2]}" ;;
    *) case ${words[1]} in @one_word@) command=${words[1]} ;; esac ;;
    esac
    _vista_table "$command" "${current%%=*}"
    candidates=()
    if [[ -n $command && ${words[${#words[@]} - 1]} == --config ]]; then
        start="" values="<path>"
    elif [[ -n $command && $current == *=* ]]; then
        start="${current%%=*}="
    elif [[ -n $command ]]; then
        start="" values=$keys
    elif (( ${#words[@]} == 1 )); then
        start="" values="@first_words@ --help --version"
    else
        start="" values=""
        case ${words[1]} in
@groups@
        esac
        (( ${#words[@]} == 2 )) || values=""
    fi
    if [[ $values == "<path>" ]]; then
        entry=${current#"$start"}
        start+=${entry%"${entry##*[\[,]}"}
        while IFS= read -r entry; do
            [[ -d $entry ]] && entry+=/
            candidates+=("$start$entry")
        done < <(compgen -f -- "${current#"$start"}")
    else
        for entry in $values; do
            [[ $start$entry == "$current"* ]] || continue
            [[ $entry == *= || -n $quote ]] || entry+=" "
            candidates+=("$start$entry")
        done
    fi
    # Readline replaces only what follows the last of its word breaks, which do not count after a quote.
    prefix=${current%"${current##*["${COMP_WORDBREAKS//[^=:]/}"]}"}
    [[ $COMP_WORDBREAKS == *[=:]* && -z $quote ]] || prefix=""
    COMPREPLY=()
    for entry in ${candidates[@]+"${candidates[@]}"}; do
        COMPREPLY+=("${entry#"$prefix"}")
    done
}

complete -o nospace -F _vista_complete vista
"""


def bash_script(table: CompletionTable) -> str:
    """The script: a table of the commands' words, and the function that completes."""
    names = list(table.commands)
    body = _BODY.replace("@two_words@", "    " + "|".join(f'"{name}"' for name in names if " " in name))
    body = body.replace("@one_word@", "|".join(name for name in names if " " not in name))
    body = body.replace("@first_words@", " ".join(table.first_words()))
    groups = (
        f'        {first}) values="{" ".join(seconds)} --help" ;;' for first, seconds in table.second_words().items()
    )
    body = body.replace("@groups@", "\n".join(groups))
    cases = "\n".join(_case(name, command) for name, command in table.commands.items())
    return _HEAD.format(version=table.version, cases=cases) + body


def _case(name: str, command: CompletedCommand) -> str:
    """Sets the words of a command, and the values of the key $2."""
    words = " ".join([*(f"{key.name}=" for key in command.keys), *command.words])
    lines = [f'    "{name}")', f'        keys="{words}"', "        case $2 in"]
    by_values: dict[str, list[str]] = {}
    for key in command.keys:
        if values := " ".join(key.words):
            by_values.setdefault(values, []).append(key.name)
    lines += [f'        {"|".join(keys)}) values="{values}" ;;' for values, keys in by_values.items()]
    return "\n".join([*lines, "        esac ;;"])
