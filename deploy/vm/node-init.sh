#!/bin/busybox sh
# Init of a guest that is a node: it loads drivers, mounts what the agent needs, and then obeys the console on ttyS1,
# a line at a time, until the machine is switched off. What it is told is the lab's business (deploy/lab/src/vm/guest.rs).
/bin/busybox mkdir -p /proc /sys /dev /tmp /run /sbin /usr/bin
/bin/busybox --install -s /bin
export PATH=/bin:/sbin LD_LIBRARY_PATH=/lib/x86_64-linux-gnu
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t securityfs securityfs /sys/kernel/security
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
# The tcb policy measures what root reads, but not on tmpfs: what changes while the node runs lives there.
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
for module in $(cat /lib/modules/order); do
    insmod "/lib/modules/$module.ko" || echo "module $module: failed"
done
mkdir -p /sys/fs/cgroup/agent /sys/fs/cgroup/mesh /run/ambit/agent /run/ambit/pods /run/netns
/sbin/ip link set lo up
sysctl -q -w net.ipv4.ip_forward=1

exec 3<>/dev/ttyS1
stty -F /dev/ttyS1 raw -echo
echo AMBIT-READY >&3
while read -r line <&3; do
    sh -c "$line" >/tmp/said 2>&1 </dev/null 3>&-
    code=$?
    xxd -p /tmp/said >&3
    echo "AMBIT-DONE $code" >&3
done
