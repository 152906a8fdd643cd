#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# ptxas_report.sh FOLDER COMMAND...: runs nvcc and keeps what ptxas says about registers, stack and
# spills in FOLDER/<source>.txt, and the PTX in FOLDER/<source>.ptx, where a test reads them.
folder=$1
shift
name=report
for argument in "$@"; do
  case $argument in *.cu) name=$(basename "$argument" .cu) ;; esac
done
kept=$folder/$name.kept
rm -rf "$kept" "$folder/$name.ptx"
mkdir -p "$kept"
"$@" --keep --keep-dir "$kept" 2>"$folder/$name.new"
status=$?
grep -v -e "^ptxas info" -e "bytes stack frame" "$folder/$name.new" >&2
mv "$folder/$name.new" "$folder/$name.txt"
# none of a compilation that a cache answers
if [ -f "$kept/$name.ptx" ]; then mv "$kept/$name.ptx" "$folder/$name.ptx"; fi
rm -rf "$kept"
exit $status
