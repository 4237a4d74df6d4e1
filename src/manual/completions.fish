# Completions of mote for fish, made by `mote completions fish`.

# Whether the line is for this command ('run' is the one without a name), and has one of these numbers of
# operands so far; without numbers, any that leaves room for an option.
function __mote_at
    set -l verb run
    set -l operands 0
    set -l value no
    set -l words (commandline -opc)
    for word in $words[2..-1]
        if test $value = yes
            set value no
        else if test "$word" = --
            # What follows is the guest's.
            contains -- $verb exec pty; and return 1
        else if contains -- $word @VALUED@
            set value yes
        else if string match -q -- '-?*' $word
            continue
        else if test $verb = run
            set verb $word
        else
            set operands (math $operands + 1)
        end
    end
    test $verb = $argv[1]; or return 1
    # The guest's paths are unknown here.
    string match -q -- ':*' (commandline -ct); and return 1
    if set -q argv[2]
        contains -- $operands $argv[2..-1]
    else
        contains -- $verb exec pty; and test $operands -gt 1; and return 1
        return 0
    end
end

# Sockets, and the directories that lead to them.
function __mote_sockets
    for file in (__fish_complete_path (commandline -ct))
        set -l path (string replace -r '^~/' "$HOME/" -- (string split -f 1 \t -- $file))
        if test -S $path -o -d $path
            echo $file
        end
    end
end

complete -c mote -f
@LINES@
