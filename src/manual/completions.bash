# Completions of mote for bash, made by `mote completions bash`.

_mote_words() {
    mapfile -t COMPREPLY < <(compgen -W "$1" -- "$cur")
}

_mote_files() {
    compopt -o filenames 2>/dev/null
    mapfile -t COMPREPLY < <(compgen -f -- "$cur")
}

# Sockets, and the directories that lead to them.
_mote_sockets() {
    local file
    compopt -o filenames 2>/dev/null
    while IFS= read -r file; do
        if [[ -S ${file/#~\//$HOME/} || -d ${file/#~\//$HOME/} ]]; then
            COMPREPLY+=("$file")
        fi
    done < <(compgen -f -- "$cur")
}

_mote() {
    local cur=${COMP_WORDS[COMP_CWORD]} verb= option= word options i operands=0
    COMPREPLY=()
    # An option whose value is the word to complete; the command; how many operands it has so far. '=' and
    # ':' are words of their own.
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        if [[ -n $option ]]; then
            [[ $word == = ]] || option=
            continue
        fi
        case $word in
            --)
                # What follows is the guest's.
                [[ $verb != exec && $verb != pty ]] || return 0 ;;
            # What follows belongs to the word before it: the rest of A=B, as a value.
            @VALUED@ | =) option=$word ;;
            -?* | :) ;;
            *)
                if [[ -z $verb ]]; then verb=$word; else operands=$((operands + 1)); fi ;;
        esac
    done
    [[ $cur != = ]] || cur=
    if [[ -n $option ]]; then
        case $option in
            @FILES@) _mote_files ;;
        esac
        return 0
    fi
    # The guest's paths are unknown here.
    [[ $cur != : && ${COMP_WORDS[COMP_CWORD - 1]} != : ]] || return 0
    case $verb in
        @OPTIONS@
        *) return 0 ;;
    esac
    if [[ $cur == -* ]]; then
        # The options of exec's and pty's command are the guest's.
        [[ ($verb == exec || $verb == pty) && $operands -gt 1 ]] || _mote_words "$options"
        return 0
    fi
    if [[ -z $verb ]]; then
        _mote_words "@VERBS@ $options"
        return 0
    fi
    case $verb:$operands in
        @OPERANDS@
    esac
}

complete -F _mote mote
