#!/usr/bin/env bash
# Runs the test suite with several releases of Python, PyTorch, Lightning and Hydra, and writes the counts to
# tests/versions.md.
#
#   tests/versions.sh                  every environment of the table below
#   tests/versions.sh oldest newest    some of them; the lines of the others in tests/versions.md stay
#   tests/versions.sh -l               the table
#   tests/versions.sh -k oldest        keep the environment, and use it again the next time (several GB each)
#   tests/versions.sh oldest -- -n 2 tests/test_rules.py    with arguments for pytest; nothing is written
#
# Pythons are looked for by name: python3.10, python3.11, ... Environments are made in .versions/, one at a time. The
# requirements of pyproject.toml are installed together with the releases of a line, so it is tested, too, that they
# admit them. tests/test_style.py leaves out the types, which are those of constraints.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

#       name      python  torch   lightning  hydra-core
table="
        oldest    3.10    2.6.0   2.4.0      1.3.2
        older     3.11    2.8.0   2.5.0      1.3.2
        middle    3.12    2.10.0  2.5.6      1.3.8
        baseline  3.11    2.13.0  2.6.6      1.3.8
        newer     3.11    2.14.1  2.6.6      1.3.8
        newest    3.13    2.15.0  2.6.6      1.4.0rc3
"
results=tests/versions.md

lines() { sed -e 's/^ *//' -e '/^$/d' <<<"$table"; }

keep=false names=() arguments=() tests_only=false
while (($#)); do
  case $1 in
    -l) lines | column -t && exit ;;
    -k) keep=true ;;
    --) shift && tests_only=true arguments=("$@") && break ;;
    -*) sed -n '2,/^set/{/^#/p}' "$0" >&2 && exit 2 ;;
    *) names+=("$1") ;;
  esac
  shift
done
((${#names[@]})) || mapfile -t names < <(lines | cut -d' ' -f1)

# Writes one line of the table of results, in the order of the table above; the others stay.
write() { # name, line
  local file name
  file=$(mktemp)
  {
    echo '# Tested versions'
    echo
    echo 'The counts of `tests/versions.sh`, which makes the environments and runs the tests in each.'
    echo
    echo '| environment | Python | PyTorch | Lightning | Hydra | passed | failed | skipped |'
    echo '| --- | --- | --- | --- | --- | --- | --- | --- |'
    while read -r name _; do
      if [[ $name == "$1" ]]; then echo "$2"; else grep -F "| $name |" "$results" 2>/dev/null || true; fi
    done < <(lines)
  } >"$file"
  cat "$file" >"$results" && rm "$file"
}

count() { # word of pytest's last line
  local number
  number=$(tail -n 1 "$log" | sed -nE "s/.*\b([0-9]+) $1.*/\1/p")
  echo "${number:-0}"
}

status=0
for name in "${names[@]}"; do
  read -r _ python torch lightning hydra < <(lines | grep "^$name ") || { echo "no environment $name" >&2 && exit 2; }
  if ! "python$python" --version >/dev/null 2>&1; then
    echo "$name: there is no python$python" >&2
    status=1
    continue
  fi
  environment=.versions/$name
  if [[ ! -x $environment/bin/pytest ]]; then
    "python$python" -m venv "$environment"
    "$environment/bin/pip" install --no-cache-dir "torch==$torch" "lightning==$lightning" \
      "pytorch-lightning==$lightning" "hydra-core==$hydra" -e '.[test]'
  fi
  log=.versions/$name.log
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$environment/bin/python" -m pytest -q -rfEs "${arguments[@]}" 2>&1 |
    tee "$log" || status=1
  if ! $tests_only; then
    errors=$(($(count failed) + $(count error)))
    write "$name" "| $name | $python | $torch | $lightning | $hydra | $(count passed) | $errors | $(count skipped) |"
  fi
  $keep || rm -r "$environment"
done
exit $status
