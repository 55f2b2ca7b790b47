# SPDX-License-Identifier: Apache-2.0 OR MIT
# Runs as root in a machine with Debian, its own kernel and systemd: installs the Debian package,
# follows the pages, upgrades with mounted devices, purges. The packages are in this directory:
# revision 1 first, 2 and 3 as upgrades, and the container image, if it was built.
set -eEuo pipefail
export HOME=/root DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
lab=$PWD
[ ! -d loopengine-*-oci ] || mv loopengine-*-oci oci

at_exit() {
    status=$?
    trap - EXIT ERR
    set +e
    if [ $status != 0 ]; then
        echo "--- the journal of loopengine"
        journalctl --no-pager --boot --unit 'loopengine*' | tail -n 60
        echo "--- warnings of the kernel"
        journalctl --no-pager --boot --dmesg --priority warning | tail -n 20
    fi
    echo "lab-status $status"
    systemctl --no-block poweroff
}
trap at_exit EXIT
trap 'echo "line $LINENO fails: $BASH_COMMAND"' ERR

step() { echo "[$(cut -d ' ' -f 1 /proc/uptime)] $*"; }
fail() { echo "failed: $*"; exit 1; }
is() { [ "$2" = "$3" ] || fail "$1: '$2' instead of '$3'"; }
# Polls: services end and devices appear in their own time.
soon() {
    for _ in $(seq 100); do ! "$@" >/dev/null 2>&1 || return 0; sleep 0.3; done
    fail "not within 30 s: $*"
}
# The last lines of apt, without its progress.
last() { sed '/(Reading database/d' | tail -n 3; }
pid() { systemctl show --property MainPID --value loopengine.service; }
as_user() { runuser --login user --command "$1"; }

# --- everything that a package could leave; the rest belongs to Debian, Podman and the test
files() {
    find / /run -xdev \( -path /proc -o -path /run/lab -o -path /run/log -o -path /run/systemd \
        -o -path /run/udev -o -path /run/credentials -o -path /run/user -o -path /run/netns \
        -o -path /var/log -o -path /var/cache -o -path /var/tmp -o -path /tmp -o -path /var/lib/apt \
        -o -path /var/lib/dpkg -o -path /var/lib/systemd -o -path /var/lib/containers \
        -o -path /run/containers -o -path /run/libpod -o -path /run/crun -o -path /run/runc \
        -o -path /srv -o -path /home \) -prune -o -print | sort
}
traces() {
    systemctl list-unit-files --no-legend 'loopengine*' 'run-loopengine*' || true
    systemctl list-units --all --no-legend 'loopengine*' 'run-loopengine*'
    find / -xdev \( -path /proc -o -path /run/lab -o -path /var/log \) -prune -o -iname '*loopengine*' -print
    find /run /dev /sys/fs/cgroup -not -path '/run/lab/*' -not -path '/run/log/*' -iname '*loopengine*'
    grep -i loopengine /sys/kernel/security/apparmor/profiles /proc/mounts || true
    losetup --list --noheadings
    find /sys/block -name 'ublkb*'
    pgrep --list-full loopengine || true
}

# --- the apt repository of the upgrades
offer() {
    mkdir -p /srv/repository
    cp "$lab"/loopengine_*-"$1"_*.deb /srv/repository/
    cd /srv/repository
    for deb in *.deb; do
        dpkg-deb --field "$deb" | sed '/^$/d'
        printf 'Filename: ./%s\nSize: %s\nSHA256: %s\n\n' "$deb" "$(stat -c %s "$deb")" \
            "$(sha256sum "$deb" | cut -d ' ' -f 1)"
    done > Packages
    echo 'deb [trusted=yes] file:/srv/repository ./' > /etc/apt/sources.list
    apt-get -qq update
    cd "$lab"
}

# Writes numbers to a file system and syncs each, until stopped; an error ends it.
writer() {
    echo 0 > "$1/numbers"
    (
        number=0
        while [ -e "$lab/writing" ]; do
            number=$((number + 1))
            echo $number >> "$1/numbers" && sync "$1/numbers" || { echo "$1: $number" >> "$lab/lost"; break; }
            sleep 0.1
        done
    ) &
}

# apt upgrade to revision $1 while file systems are mounted on devices and are written to.
upgrade() {
    systemctl start loopengine
    list=$(loopengine list)
    echo "$list"
    before=$(pid)
    touch "$lab/writing"
    writer /mnt/one
    writer /mnt/two
    sleep 2
    offer "$1"
    apt-get upgrade --yes 2>&1 | last
    is "version" "$(dpkg-query --show --showformat '${Version}' loopengine | sed 's/.*-//')" "$1"
    after=$(pid)
    [ "$after" != 0 ] && [ "$after" != "$before" ] || fail "pid $before before, $after after the upgrade"
    is "the running program" "$(readlink /proc/"$after"/exe)" /usr/bin/loopengine
    is "devices" "$(loopengine list)" "$list"
    at=$(wc -l < /mnt/one/numbers)
    sleep 3
    rm "$lab/writing"
    wait
    [ ! -e "$lab/lost" ] || fail "a write failed: $(cat "$lab/lost")"
    for disk in one two; do
        written=$(tail -n 1 /mnt/$disk/numbers)
        is "numbers on $disk" "$(cat /mnt/$disk/numbers)" "$(seq 0 "$written")"
        (cd /mnt/$disk && sha256sum --check --quiet sums) || fail "$disk changed"
        grep -q " /mnt/$disk ext4 rw" /proc/mounts || fail "$disk is no longer writable"
    done
    [ "$(wc -l < /mnt/one/numbers)" -gt "$at" ] || fail "no write after the upgrade"
    step "upgraded to revision $1: pid $before -> $after; $written writes, none lost"
}

systemctl is-system-running --wait || systemctl --failed --no-legend
step "$(uname -r), $(. /etc/os-release && echo "$PRETTY_NAME"), $(systemctl --version | head -n 1)"
podman info > /dev/null
files > before
traces > traces.before

step "apt install ./loopengine_*.deb"
apt-get install --yes ./loopengine_*-1_*.deb 2>&1 | last
is "the socket" "$(systemctl is-enabled loopengine.socket) $(systemctl is-active loopengine.socket)" "enabled active"
grep -q '^loopengine (unconfined)' /sys/kernel/security/apparmor/profiles || fail "no AppArmor profile"
loopengine list # starts the service
is "the service" "$(systemctl is-active loopengine.service)" active
systemctl enable --now loopengine
is "the service" "$(systemctl is-enabled loopengine.service)" enabled
loopengine doctor || true
is "ublks_max" "$(cat /sys/module/ublk_drv/parameters/ublks_max)" 4096

step "README: quick start"
cd /srv
loopengine create disk.img --size 10G
dev=$(loopengine attach disk.img)
mkfs.ext4 -q "$dev" && mount "$dev" /mnt
disk=$(readlink -f "$dev")
udevadm settle
udevadm info --query property "$disk" | grep -q UDISKS_IGNORE=1 || fail "udev's rule does not know $disk"
umount /mnt && loopengine detach "$dev"

step "mount an image without root"
truncate -s 64M ~user/disk.img && mkfs.ext4 -q ~user/disk.img && chown user: ~user/disk.img
as_user 'set -ex
    mkdir -p mnt
    loopengine mount disk.img mnt
    ls mnt; cp /etc/os-release mnt/
    loopengine umount mnt
    ! findmnt mnt'
is "a copied file" "$(debugfs -R 'cat os-release' ~user/disk.img 2>/dev/null)" "$(cat /etc/os-release)"
as_user 'printf "label: gpt\nsize=16M\nsize=16M\n" > table
    truncate -s 64M parts.img && /usr/sbin/sfdisk -q parts.img < table && truncate -s 16M part.img &&
    /usr/sbin/mkfs.ext4 -q part.img && dd if=part.img of=parts.img bs=1M seek=1 conv=notrunc status=none &&
    dd if=part.img of=parts.img bs=1M seek=17 conv=notrunc status=none
    set -ex
    loopengine mount --all parts.img mnt
    ls -d mnt/1/lost+found mnt/2/lost+found
    loopengine umount --all mnt'

step "the same with losetup and mount"
as_user 'set -ex
    loopengine run -- bash -exc "
        losetup -f --show disk.img; losetup -l; lsblk /dev/loop0
        mkdir -p here; mount -o loop disk.img here; cat here/os-release | head -n 1; echo more > here/more
        losetup -a; umount here"'
soon as_user '! loopengine list --all 2>/dev/null | grep disk.img'
is "a written file" "$(debugfs -R 'cat more' ~user/disk.img 2>/dev/null)" more
is "loop devices of the host" "$(losetup -l)" ""
printf '[private]\nkernel_mounts = ["ext4", "xfs"]\n' > /etc/loopengine.toml
systemctl restart loopengine
as_user 'set -ex
    loopengine run --mount ext4,xfs -- bash -exc "
        mkdir -p here; mount -o loop disk.img here; findmnt -no FSTYPE,OPTIONS here; umount here"'
rm /etc/loopengine.toml
systemctl restart loopengine

step "private loop devices for a container: Podman"
# The image of the container is this system.
mkdir -p /srv/upper /srv/work /srv/container
mount -t overlay overlay -o lowerdir=/,upperdir=/srv/upper,workdir=/srv/work /srv/container
IMAGE="--rootfs /srv/container"
inside='set -ex; cd /root
    truncate -s 64M disk.img && mkfs.ext4 -q disk.img
    mount -o loop disk.img /mnt
    findmnt -no SOURCE,FSTYPE /mnt; losetup -l; echo inside > /mnt/file; umount /mnt'
options=$(loopengine podman-setup ci --max 4 --mount ext4,xfs)
printf '%s\n' "$inside" > /srv/upper/inside
script --quiet --return --command "podman run -it $options $IMAGE bash /inside" /dev/null < /dev/null
is "a file of the container" "$(debugfs -R 'cat file' /srv/upper/root/disk.img 2>/dev/null)" inside
podman rm --all > /dev/null
loopengine podman-setup ci --remove

for runtime in runc crun; do
    step "private loop devices for a container: $runtime"
    mkdir -p /srv/ci && loopengine instance mount --container --name "$runtime" --max 4 --mount ext4,xfs /srv/ci
    mkdir -p /srv/bundle && cd /srv/bundle && rm -f config.json && $runtime spec
    sed -i 's,"path": "rootfs","path": "/srv/container",; s,"readonly": true,"readonly": false,
        s,"terminal": true,"terminal": false,; s,"sh","bash"\, "/inside",' config.json
    loopengine oci print-config --pool "$runtime" config.json > new && mv new config.json
    $runtime run c1
    cd "$lab"
    umount -R /srv/ci
done
umount /srv/container

if [ -d oci ]; then
    step "the container image"
    skopeo inspect oci:oci | grep -E '"(Architecture|Digest)"|version'
    podman pull --quiet oci:oci > image
    podman run --rm --network none "$(cat image)" --version
    # The container serves; this machine's program talks to it.
    systemctl stop loopengine.socket loopengine.service
    podman run --detach --name served --privileged --network none --pid host --volume /dev:/dev \
        --volume /srv:/srv --volume /run/loopengine:/run/loopengine "$(cat image)" > /dev/null
    soon test -S /run/loopengine/control
    podman exec served loopengine doctor || true
    loopengine list
    dev=$(loopengine attach /srv/disk.img)
    mount "$dev" /mnt && umount /mnt && loopengine detach "$dev"
    podman stop served > /dev/null
    podman rm --all > /dev/null
    podman rmi "$(cat image)" > /dev/null
    systemctl start loopengine.socket loopengine.service
fi

step "upgrade with mounted devices"
mkdir -p /mnt/one /mnt/two
for disk in one two; do
    loopengine create /srv/$disk.img --size 512M
    dev=$(loopengine attach /srv/$disk.img)
    mkfs.ext4 -q "$dev" && mount "$dev" /mnt/$disk
    head -c 20M /dev/urandom > /mnt/$disk/random
    (cd /mnt/$disk && sha256sum random > sums)
done
upgrade 2

step "removal while a device is in use"
for daemon in runs stopped; do
    [ $daemon = runs ] || systemctl stop loopengine.socket loopengine.service
    ! apt-get purge --yes loopengine > said 2>&1 || fail "purged while devices are mounted"
    grep 'devices are in use' said
    is "the package" "$(dpkg-query --show --showformat '${db:Status-Status}' loopengine)" installed
    is "units" "$(systemctl is-active loopengine.socket loopengine.service | tr '\n' ' ')" "active active "
    (cd /mnt/one && sha256sum --check --quiet sums && sync .)
done
dpkg --set-selections <<< 'loopengine install'
umount /mnt/one /mnt/two
loopengine detach --all

step "the same with devices of the kernel's loop driver"
mkdir -p /etc/systemd/system/loopengine.service.d
printf '[Service]\nExecStart=\nExecStart=/usr/bin/loopengine serve --backend loop\n' \
    > /etc/systemd/system/loopengine.service.d/lab.conf
systemctl daemon-reload
systemctl restart loopengine
for disk in one two; do
    mount "$(loopengine attach /srv/$disk.img)" /mnt/$disk
done
upgrade 3
umount /mnt/one /mnt/two
rm -r /etc/systemd/system/loopengine.service.d /mnt/one /mnt/two
systemctl daemon-reload

step "apt purge"
apt-get purge --yes loopengine 2>&1 | last
rm -r /etc/apt/sources.list /srv/repository
files > after
diff before after || fail "files are left (>) or gone (<)"
traces > traces.after
diff traces.before traces.after || fail "traces are left"
step "purged: nothing is left"
