# Completion of vireo for bash: eval "$(vireo completion bash)", or install as
# /usr/share/bash-completion/completions/vireo.
_vireo() {
    local words=() word rest=$COMP_LINE i found current keep
    # What COMP_WORDBREAKS took apart (a=b, a:b) is put together again.
    for ((i = 0; i <= COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        if ((i > 0)) && [[ $rest == [![:space:]]* ]]; then
            words[${#words[@]} - 1]+=$word
        else
            words+=("$word")
            rest=${rest#"${rest%%[![:space:]]*}"}
        fi
        rest=${rest#"$word"}
    done
    current=${words[${#words[@]} - 1]}
    COMPREPLY=()
    while IFS= read -r found; do
        COMPREPLY+=("$found")
    done < <("${words[0]}" complete -- "${words[@]:1}" 2>/dev/null)
    # Bash replaces only what is behind the last break.
    keep=${current%"${current##*[=:]}"}
    if [[ -n $keep ]]; then
        COMPREPLY=("${COMPREPLY[@]#"$keep"}")
    fi
    for i in "${!COMPREPLY[@]}"; do
        printf -v "COMPREPLY[$i]" %q "${COMPREPLY[i]}"
    done
}
complete -o default -F _vireo vireo
