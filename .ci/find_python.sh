#!/bin/sh
# Prints the path of a Python >= 3.12 that can make virtual environments: $1 if given, else the first one found here.
set -eu

usable() {
    "$1" -c 'import sys, ensurepip, venv; print(sys.executable) if sys.version_info >= (3, 12) else sys.exit(1)' 2>/dev/null
}

if [ -n "${1:-}" ]; then
    usable "$1" && exit
    echo "PYTHON=$1 is not a Python >= 3.12 with the modules venv and ensurepip" >&2
    exit 1
fi

# pyenv's own commands answer only for the version it has selected, so its interpreters are also tried by path.
pyenv_pythons=
if command -v pyenv >/dev/null; then
    pyenv_pythons=$(ls -d "$(pyenv root)"/versions/3.1[2-9]*/bin/python 2>/dev/null || true)
fi
for candidate in python3.12 python3.13 python3.14 python3 python $pyenv_pythons; do
    usable "$candidate" && exit
done
echo "No Python >= 3.12 with the modules venv and ensurepip was found." >&2
echo "Install one (on Debian and Ubuntu: python3 and python3-venv), or name it:  make PYTHON=/path/to/python3.12" >&2
exit 1
