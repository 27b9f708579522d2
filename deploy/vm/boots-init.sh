#!/bin/busybox sh
# Init of a guest whose only work is to be measured: it makes an attestation key, quotes, and hands everything that a
# verifier could want to the serial console as one base64 archive. `boot=` on the command line says what else it does.
/bin/busybox --install -s /bin
export PATH=/bin LD_LIBRARY_PATH=/lib/x86_64-linux-gnu TPM2TOOLS_TCTI=device:/dev/tpmrm0
mkdir -p /proc /sys /dev /tmp /run
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t securityfs securityfs /sys/kernel/security
# tmpfs, because the tcb policy does not measure it: what is written here stays out of the IMA log.
mount -t tmpfs tmpfs /tmp
dmesg -n 1

# A file opened for writing while someone reads it (time of measure, time of use), and one read while someone writes.
violate() {
    mkdir -p /etc
    echo one >/etc/read-first.conf
    exec 3</etc/read-first.conf
    echo two >>/etc/read-first.conf
    exec 3<&-
    exec 4>>/etc/written-first.conf
    echo one >&4
    cat /etc/written-first.conf >/dev/null
    exec 4>&-
}

collect() {
    cat /proc/cmdline >cmdline
    tpm2 createek -Q -G rsa -c ek.ctx -u ek.tpm2b_public
    tpm2 createak -Q -C ek.ctx -c ak.ctx -G ecc -g sha256 -s ecdsa -f tpmt -u ak.tpmt_public -n ak.name
    tpm2 flushcontext -t
    tpm2 readpublic -Q -c ak.ctx -f pem -o ak.pem
    tpm2 flushcontext -t
    tpm2 nvread -Q 0x01c00002 -C o -o ek-rsa2048.nv.der
    tpm2 nvread -Q 0x01c00016 -C o -o ek-p384.nv.der
    grep -q boot=violate /proc/cmdline && violate
    # The tools have run by now, so that nothing new is measured between the logs and the quote.
    tpm2 quote -Q -c ak.ctx -g sha256 -l sha256:0,1,2,3,4,5,6,7,8,9,10,14 -q "$(cat /nonce)" \
        -m quote.tpms_attest -s quote.tpmt_signature -f tss -o quote.tpm2tools_pcrs
    tpm2 flushcontext -t
    cat /sys/kernel/security/tpm0/binary_bios_measurements >binary_bios_measurements || rm binary_bios_measurements
    for log in ascii binary; do
        cat /sys/kernel/security/ima/${log}_runtime_measurements >ima_${log}_runtime_measurements
    done
    for bank in sha1 sha256 sha384; do
        for pcr in $(seq 0 23); do
            echo "$pcr $(cat /sys/class/tpm/tpm0/pcr-$bank/$pcr)"
        done >pcrs.$bank
    done
    dmesg >dmesg
    rm -f ek.ctx ak.ctx
}

mkdir /tmp/out && cd /tmp/out && collect 2>/tmp/errors
cp /tmp/errors .
stty -F /dev/ttyS0 -opost
echo
echo AMBIT-BOOT-BEGIN
tar -cz . | base64
echo AMBIT-BOOT-END
sync
poweroff -f
