# Sourced by job.sh. What a user wrote into one variable, as words, and none of it evaluated.

# words TEXT: sets the array `words`. Quotes and backslashes hold a word together as in a shell; $, `, *, ~ and ; are
# characters like all others, since no shell reads the text.
words() {
    words=()
    # xargs ends with an error where a quote is never closed.
    xargs -r printf '%s\0' <<< "$1" > /dev/null 2>&1 || return 1
    mapfile -d '' -t words < <(xargs -r printf '%s\0' <<< "$1")
}
