#!/usr/bin/env bash
# Print where the virtual environment of this clone belongs: .venv, or, where the clone's path has a blank, a folder of
# this user whose path has none. torch hands the paths of its libraries to the compiler, and vLLM to LD_PRELOAD, without
# quotes: with a blank in them torch.compile ends with "cannot find -ltorch".
set -euo pipefail

cd "$(dirname "$0")/.."
case $PWD in
    *[[:space:]]*) ;;
    *) echo .venv && exit ;;
esac

name=venv-$(printf '%s' "$PWD" | cksum | cut -d ' ' -f 1)
for parent in "${XDG_CACHE_HOME:-${HOME:-}/.cache}/glassbox" "/var/tmp/glassbox-$(id -u)"; do
    case $parent in
        *[[:space:]]* | [!/]*) continue ;;
    esac
    # Below /var/tmp another user may have made it first.
    if (umask 077 && mkdir -p "$parent") 2>/dev/null && [ -O "$parent" ] && [ ! -L "$parent" ] && [ -w "$parent" ]; then
        echo "$parent/$name" && exit
    fi
done
echo "the path of this clone has a blank, which torch.compile can't take: name a folder without one, make VENV=/path" >&2
exit 1
