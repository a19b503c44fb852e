#compdef vireo
# Completion of vireo for zsh: eval "$(vireo completion zsh)" after compinit, or install as _vireo in a folder of
# $fpath.
_vireo() {
    local line
    local -a found
    while IFS= read -r line; do
        found+=("$line")
    done < <("${(Q)words[1]}" complete -- "${(Q@)words[2,CURRENT]}" 2>/dev/null)
    if (( $#found )); then
        compadd -- "${found[@]}"
    else
        _files
    fi
}
if [[ ${funcstack[1]} == _vireo ]]; then
    _vireo "$@"
else
    compdef _vireo vireo
fi
