# Completion of vireo for fish: vireo completion fish | source, or install as
# /usr/share/fish/vendor_completions.d/vireo.fish.
function __vireo_complete
    set -l before (commandline -opc)
    set -l current (commandline -ct)
    set -l found ($before[1] complete -- $before[2..-1] "$current" 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\n' $found
    else
        __fish_complete_path "$current"
    end
end
complete -c vireo -f -a '(__vireo_complete)'
