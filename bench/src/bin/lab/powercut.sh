# The guest's half of the power cuts; powercut.rs sets ROUND, and DURABLE before the second boot.
#
# First boot: a file system on /dev/vda, an image of unwritten blocks on it, a device on the image.
# Every line "durable ..." names something that the device promised to keep. The image's blocks are
# unwritten, so what is not committed with its metadata reads as zeros after the cut.
# Second boot: all that was promised is looked for.
set -eu
store=/run/store
mkdir -p $store /run/inside

pattern() { yes "$1" | head -c 4096 || true; }   # `yes` ends by SIGPIPE
block()   { pattern "$1-$2" > /run/block; }

serve() {
    loopengine serve >/run/daemon.log 2>&1 &
    for _ in $(seq 100); do loopengine list >/dev/null 2>&1 && return; sleep 0.1; done
    cat /run/daemon.log; exit 1
}

promise() {
    mkfs.$FS -q /dev/vda && mount /dev/vda $store
    fallocate -l 64M $store/blocks
    fallocate -l 64M $store/files
    sync
    serve
    blocks=$(loopengine attach $store/blocks)
    files=$(loopengine attach $store/files)
    mkfs.ext4 -q $files && mount $files /run/inside
    # Load beside it that nobody asked to be durable: half of the image, never synced.
    fio --name=noise --filename=$blocks --rw=randwrite --bs=4k --direct=1 --offset=32M --size=32M \
        --time_based --runtime=100 >/dev/null 2>&1 &
    for i in $(seq 0 2 1000); do
        # A flush: the write is answered, then fsync.
        block fsync $i
        dd if=/run/block of=$blocks bs=4096 seek=$i count=1 oflag=direct conv=fsync,notrunc status=none
        echo "durable fsync $i"
        # FUA: written with O_DSYNC.
        block fua $i
        dd if=/run/block of=$blocks bs=4096 seek=$((i + 1)) count=1 oflag=direct,dsync conv=notrunc status=none
        echo "durable fua $i"
        # FUA as journals use it: the commit record is written with nothing after it.
        pattern file-$i | dd of=/run/inside/file-$i conv=fsync status=none
        echo "durable file $i"
    done
}

keep() {
    mount /dev/vda $store
    # Replays the journal, as the next mount would.
    mount -o loop $store/files /run/inside
    echo "$DURABLE" | while read -r kind i; do
        case $kind in
            fsync) dd if=$store/blocks bs=4096 skip=$i count=1 status=none ;;
            fua)   dd if=$store/blocks bs=4096 skip=$((i + 1)) count=1 status=none ;;
            file)  cat /run/inside/file-$i ;;
        esac > /run/found 2>/dev/null || true
        block $kind $i
        cmp -s /run/block /run/found && echo "kept $kind $i" || echo "lost $kind $i"
    done
    umount /run/inside
    e2fsck -f -n $store/files >/run/e2fsck.log 2>&1 && echo "clean" || { echo "damaged"; cat /run/e2fsck.log; }
}

$ROUND
