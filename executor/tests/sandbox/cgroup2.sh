#!/bin/sh
# The cgroup tests under a kernel of its own whose controllers are all of version 2, which many a machine has in
# version 1 (`make cgroups`). Takes user-mode-linux: apt-get install user-mode-linux.
#
# The kernel starts this file again as its first process, in a unit that was delegated with a subgroup, which is how
# systemd would start an executor. It sees the files of this machine, but writes only to memory and to $hive_result.
set -eu

if [ "$$" != 1 ]; then
    command -v linux.uml >/dev/null || { echo "linux.uml is missing: apt-get install user-mode-linux" >&2; exit 1; }
    root=$(cd "$(dirname "$0")/../../.." && pwd)
    result=$(mktemp)
    linux.uml mem=3072M rootfstype=hostfs rootflags=/ rw con=null con0=fd:0,fd:1 quiet \
        init="$root/executor/tests/sandbox/cgroup2.sh" "hive_root=$root" "hive_home=$HOME" \
        "hive_result=$result" </dev/null
    code=$(cat "$result")
    rm -f "$result"
    exit "${code:-1}"
fi

export PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin HOME="$hive_home"
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo "+memory +pids" >/sys/fs/cgroup/cgroup.subtree_control
mkdir -p /sys/fs/cgroup/unit/main /run/tmp
echo $$ >/sys/fs/cgroup/unit/main/cgroup.procs
export TMPDIR=/run/tmp
cd "$hive_root"
code=0
.venv/bin/python -m pytest -q --color=no -p no:cacheprovider --timeout=600 executor/tests/sandbox/test_cgroups.py || code=$?
if [ -n "$(find /sys/fs/cgroup -name 'hive-*')" ]; then
    echo "cgroups are left over"
    code=1
fi
echo "$code" >"$hive_result"
halt -f
