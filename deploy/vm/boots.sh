#!/bin/bash
# Measured boots of several kinds under QEMU (TCG) with a software TPM: `boots.sh OUTPUT KIND...`.
# What it leaves in OUTPUT/KIND is what firmware, boot loader, kernel and TPM produced; nothing is edited.
# Needs qemu-system-x86, ovmf, mtools, cpio, fdisk, swtpm-tools, tpm2-tools; for `mok`, `dbx` and `efistub-sb` also sbsigntool
# and virt-firmware (PyPI; put its folder first in PATH). Kernel, shim and grub are Debian's signed packages, unpacked and
# never installed. Kinds that need no word here are told in attestation/verify/tests/boots/README.md.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1
shift
work=${BOOTS_WORK:-$out/.work}
root=$work/debian
ovmf=/usr/share/OVMF
# Owner of the signatures that are added, any GUID.
owner=8f1f6b8e-7c53-4d59-9a0e-0b6f1f9f3a11
mkdir -p "$out/ca" "$work"

main() {
    unpack_debian
    prepare_ca
    for kind in "$@"; do
        boot "$kind"
    done
}

# Packages are unpacked and not installed: a signed boot chain must not touch this machine's own.
unpack_debian() {
    [ -e "$root/.done" ] && return
    mkdir -p "$work/packages" "$root"
    (
        cd "$work/packages"
        kernel=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends/ {print $2; exit}')
        apt-get download "$kernel" shim-signed shim-helpers-amd64-signed grub-efi-amd64-signed busybox-static
        for package in *.deb; do
            dpkg-deb -x "$package" "$root"
        done
    )
    cp "$root"/boot/vmlinuz-* "$work/vmlinuz"
    touch "$root/.done"
}

# Only the certificates leave the work folder.
prepare_ca() {
    local ca=$work/ca
    mkdir -p "$ca"
    cat >"$work/localca.conf" <<END
statedir = $ca
signingkey = $ca/signkey.pem
issuercert = $ca/issuercert.pem
certserial = $ca/certserial
END
    printf -- '--platform-manufacturer Ambit\n--platform-version 1.0\n--platform-model Boots\n' >"$work/localca.options"
    cat >"$work/setup.conf" <<END
create_certs_tool = $(command -v swtpm_localca)
create_certs_tool_config = $work/localca.conf
create_certs_tool_options = $work/localca.options
active_pcr_banks = sha1,sha256,sha384
END
}

# An initrd with tpm2-tools, its libraries and the init; $2 is a file in it to alter, if any.
make_initrd() {
    local tree=$1/tree altered=${2:-} library
    mkdir -p "$tree"/{bin,lib64,lib/x86_64-linux-gnu,usr/lib/x86_64-linux-gnu}
    cp "$root/bin/busybox" "$tree/bin/"
    cp "$(readlink -f /usr/bin/tpm2)" "$tree/bin/tpm2"
    cp -L /lib64/ld-linux-x86-64.so.2 "$tree/lib64/"
    for library in $(ldd "$(readlink -f /usr/bin/tpm2)" | awk '$2 == "=>" {print $3}'); do
        cp -L "$library" "$tree/lib/x86_64-linux-gnu/"
    done
    cp -L /usr/lib/x86_64-linux-gnu/libtss2-tcti-device.so.0 "$tree/usr/lib/x86_64-linux-gnu/"
    cp "$here/boots-init.sh" "$tree/init"
    chmod 755 "$tree/init"
    echo -n "$nonce" >"$tree/nonce"
    # Bytes after the last section: the program runs as before and its digest is another.
    [ -z "$altered" ] || echo altered >>"$tree/$altered"
    find "$tree" -exec touch -h -d @0 {} +
    (cd "$tree" && find . | LC_ALL=C sort | cpio -o -H newc --quiet --reproducible | gzip -n9) >"$1/initrd"
}

# A FAT disk with a removable-media path; files come as NAME=SOURCE.
make_disk() {
    local disk=$1 file
    shift
    truncate -s 64M "$disk"
    SOURCE_DATE_EPOCH=0 mformat -i "$disk" -F -N 12345678 ::
    mmd -i "$disk" ::EFI ::EFI/BOOT ::EFI/debian
    for file in "$@"; do
        mcopy -i "$disk" "${file#*=}" "::${file%%=*}"
    done
}

# Puts the file system into the only partition of a GPT disk, with identifiers that do not change.
partition() {
    mv "$1" "$1.esp"
    truncate -s 66M "$1"
    printf '%s\n' 'label: gpt' 'label-id: 6F1D6A0C-5B0E-4C0B-9C4E-0A6D1B2C3D4E' \
        'start=2048, size=131072, type=uefi, uuid=0B8E1B3A-7E52-4F57-8E8A-6F6B1C2D3E4F' | sfdisk -q "$1"
    dd if="$1.esp" of="$1" bs=1M seek=1 conv=notrunc,sparse status=none
}

grub_cfg() {
    printf 'linux%s /vmlinuz %s\ninitrd%s /initrd\nboot\n' "$2" "$1" "$2"
}

# A signer of its own, as an owner of machines would have; the key stays in the work folder.
make_key() {
    openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj "/CN=Ambit boots $(basename "$1")" -keyout "$1/signer.key" \
        -out "$1/signer.pem" 2>/dev/null
}

# Debian's signature goes, so that only this key's remains.
sign() {
    cp "$work/vmlinuz" "$2.unsigned"
    sbattach --remove "$2.unsigned"
    sbsign --key "$1/signer.key" --cert "$1/signer.pem" --output "$2" "$2.unsigned" 2>/dev/null
}

# Adds the signer to a variable: `--add-db` or `--add-mok`.
with_key() {
    virt-fw-vars --inplace "$1/vars.fd" "$2" "$owner" "$1/signer.pem" 2>/dev/null
}

# A variable store with one boot entry that starts $2 with $3 as its load options.
with_boot_entry() {
    python3 "$here/boots-entry.py" "$1" "$2" "$3"
}

boot() {
    local kind=$1 dir=$work/$1 altered='' loader=''
    local shim=$root/usr/lib/shim grub=$root/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed
    local code=$ovmf/OVMF_CODE_4M.ms.fd vars=$ovmf/OVMF_VARS_4M.ms.fd
    local cmdline='console=ttyS0 rootfstype=ramfs ima_policy=tcb ima_hash=sha256 panic=5'
    local -a disk direct=()
    # A twin differs from its sibling in its TPM alone: the nonce is part of the initrd.
    nonce=$(echo -n "ambit/boots/${kind%-twin}" | sha256sum | cut -c1-64)
    rm -rf "$dir"
    mkdir -p "$dir/tpm"
    cp "$vars" "$dir/vars.fd"
    case $kind in
    secureboot-grub-2) altered=lib/x86_64-linux-gnu/libz.so.1 cmdline+=' mitigations=off' ;;
    ima-violations) cmdline+=' boot=violate' ;;
    # Without Secure Boot grub starts the kernel past its EFI stub, and only the stub passes the log on. `linuxefi` does not.
    nosb-grub) loader=efi ;;
    ima-off) cmdline=${cmdline/ima_policy=tcb ima_hash=sha256 /} ;;
    esac
    make_initrd "$dir" "$altered"
    grub_cfg "$cmdline" "$loader" >"$dir/grub.cfg"
    disk=("EFI/BOOT/BOOTX64.EFI=$shim/shimx64.efi.signed" "EFI/BOOT/grubx64.efi=$grub" "EFI/BOOT/mmx64.efi=$shim/mmx64.efi.signed"
        "EFI/debian/grub.cfg=$dir/grub.cfg" "vmlinuz=$work/vmlinuz" "initrd=$dir/initrd")
    case $kind in
    nosb-grub | nolog | nolog-shim)
        code=$ovmf/OVMF_CODE_4M.fd
        cp "$ovmf/OVMF_VARS_4M.fd" "$dir/vars.fd"
        ;;&
    nolog)
        disk[0]="EFI/BOOT/BOOTX64.EFI=$grub"
        unset 'disk[1]' 'disk[2]'
        ;;
    efistub-nosb)
        code=$ovmf/OVMF_CODE_4M.fd
        cp "$ovmf/OVMF_VARS_4M.fd" "$dir/vars.fd"
        disk=()
        direct=(-kernel "$work/vmlinuz" -initrd "$dir/initrd" -append "$cmdline")
        ;;
    efistub-sb)
        # shim wants a `.sbat` section of what it starts, which this kernel lacks: the firmware starts it, by a key in db.
        make_key "$dir"
        sign "$dir" "$dir/vmlinuz"
        with_key "$dir" --add-db
        disk=("EFI/BOOT/BOOTX64.EFI=$dir/vmlinuz" "EFI/BOOT/initrd=$dir/initrd")
        with_boot_entry "$dir/vars.fd" '\EFI\BOOT\BOOTX64.EFI' "initrd=\\EFI\\BOOT\\initrd $cmdline"
        ;;
    dbx)
        virt-fw-vars --inplace "$dir/vars.fd" --add-dbx-hash "$owner" \
            "$(echo -n revoked | sha256sum | cut -c1-64)" 2>/dev/null
        ;;
    mok)
        make_key "$dir"
        sign "$dir" "$dir/vmlinuz"
        with_key "$dir" --add-mok
        disk[4]="vmlinuz=$dir/vmlinuz"
        ;;
    esac
    make_disk "$dir/disk.img" "${disk[@]}"
    [ "$kind" != gpt ] || partition "$dir/disk.img"
    swtpm_setup --tpm2 --tpm-state "dir://$dir/tpm" --config "$work/setup.conf" --create-ek-cert --create-platform-cert \
        --lock-nvram --vmid "$kind" --pcr-banks sha1,sha256,sha384 --overwrite >"$dir/setup.log" 2>&1
    cp "$work/ca/issuercert.pem" "$work/ca/swtpm-localca-rootca-cert.pem" "$out/ca/"
    run_guest "$dir" "$code" "${direct[@]}"
    keep "$kind" "$dir"
}

run_guest() {
    local dir=$1 code=$2
    shift 2
    swtpm socket --tpm2 --tpmstate "dir=$dir/tpm" --ctrl "type=unixio,path=$dir/tpm.sock" --flags startup-clear --terminate &
    local tpm=$!
    while [ ! -S "$dir/tpm.sock" ]; do
        sleep 0.05
    done
    timeout 600 qemu-system-x86_64 -machine q35,smm=on -accel tcg -cpu max -m 768 -smp 1 -nodefaults -no-user-config \
        -display none -no-reboot -global driver=cfi.pflash01,property=secure,value=on \
        -drive "if=pflash,format=raw,unit=0,readonly=on,file=$code" -drive "if=pflash,format=raw,unit=1,file=$dir/vars.fd" \
        -drive "if=none,id=disk,format=raw,file=$dir/disk.img" -device virtio-blk-pci,drive=disk \
        -chardev "socket,id=tpm,path=$dir/tpm.sock" -tpmdev emulator,id=tpm0,chardev=tpm -device tpm-crb,tpmdev=tpm0 \
        -serial "file:$dir/serial" "$@" || echo "qemu ended with $?" >&2
    wait $tpm || true
}

keep() {
    local kind=$1 dir=$2 kept=$out/$1
    mkdir -p "$dir/out"
    tr -d '\r' <"$dir/serial" | sed -n '/^AMBIT-BOOT-BEGIN/,/^AMBIT-BOOT-END/p' | grep -v AMBIT-BOOT | base64 -d | tar -xz -C "$dir/out"
    rm -rf "$kept.new"
    mkdir -p "$kept.new"
    cp "$dir"/out/* "$kept.new/"
    mv "$kept.new/errors" "$kept.new/dmesg" "$dir/"
    echo -n "$nonce" >"$kept.new/nonce"
    rm -rf "$kept"
    mv "$kept.new" "$kept"
    echo "$kind: $(ls "$kept" | tr '\n' ' ')"
}

main "$@"
