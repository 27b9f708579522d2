#!/bin/busybox sh
# Init of a guest in which another kernel runs the kernel side's own tests (cargo xtask kernels): it loads drivers, mounts what
# they need, runs each suite in /target/deps, tells how it ended on the console, and switches the machine off.
/bin/busybox mkdir -p /proc /sys /dev /tmp /run /root
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mkdir -p /sys/fs/cgroup
/bin/busybox mount -t cgroup2 cgroup2 /sys/fs/cgroup
/bin/busybox mount -t bpf bpf /sys/fs/bpf
/bin/busybox mount -t tmpfs tmpfs /tmp
/bin/busybox mount -t tmpfs tmpfs /run
for module in $(/bin/busybox cat /lib/modules/order); do
    /bin/busybox insmod "/lib/modules/$module.ko" || echo "module $module: failed"
done
ip link set lo up
echo "AMBIT-KERNEL $(/bin/busybox uname -r)"
for program in /target/deps/*; do
    name=${program##*/}
    echo "AMBIT-BEGIN $name"
    "$program" --test-threads=1 2>&1
    echo "AMBIT-END $name $?"
done
/bin/busybox poweroff -f
