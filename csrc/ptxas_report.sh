#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# ptxas_report.sh FOLDER COMMAND...: runs nvcc and keeps what ptxas says about registers, stack and
# spills in FOLDER/<source>.txt, where a test reads it.
folder=$1
shift
name=report
for argument in "$@"; do
  case $argument in *.cu) name=$(basename "$argument" .cu) ;; esac
done
mkdir -p "$folder"
"$@" 2>"$folder/$name.new"
status=$?
grep -v -e "^ptxas info" -e "bytes stack frame" "$folder/$name.new" >&2
mv "$folder/$name.new" "$folder/$name.txt"
exit $status
