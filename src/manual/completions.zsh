#compdef mote
# Completions of mote for zsh, made by `mote completions zsh`.

_mote() {
    local state verb=
    local -a verbs arguments
    verbs=(
        @VERBS@
    )
    (( CURRENT == 2 )) || verb=$words[2]
    case $verb in
        @CASES@
        *)
            _arguments -S @RUN@ '1: :->verb'
            [[ $state != verb ]] || _describe command verbs
            return ;;
    esac
    shift words
    (( CURRENT-- ))
    _arguments -S $arguments
}

_mote "$@"
