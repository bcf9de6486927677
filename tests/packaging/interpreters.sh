#!/usr/bin/env bash
# The wheel on each other Python of 3.11 to 3.13 that this machine has: every file compiles, and the
# stages run that need neither torch nor other large libraries: tests/packaging/interpreters.sh WHEEL
# RELEASING.md has the commands that run all stages, which take 6 GB per interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."
wheel=$(realpath "$1")
own=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
is_version() { "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$2')" 2>/dev/null; }

for version in 3.11 3.12 3.13; do
    for python in "python$version" "$HOME"/.pyenv/versions/"$version".*/bin/python; do
        if [ "$version" = "$own" ] || ! is_version "$python" "$version"; then continue; fi
        env=build/python$version
        "$python" -m venv --clear --without-pip "$env"
        install=(.venv/bin/python -m pip --disable-pip-version-check --python "$env/bin/python" install -q)
        "${install[@]}" numpy pyyaml pydantic click rich obstore simplejpeg pillow
        "${install[@]}" --no-deps "$wheel"
        "$env/bin/python" -m compileall -q "$env"/lib/python*/site-packages/{configs,sharding,encoders,training,eval,slurm}
        tests/packaging/demo.sh "$env/bin"
        break
    done
done
