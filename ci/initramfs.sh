# shellcheck shell=bash disable=SC2154
# Shared by the scripts that build an initramfs for a test guest; `lib.sh` comes before it.
#
# `drivers` is an array of the drivers that the guest loads, `root` the directory that becomes the initramfs.

# Sets `kernel`, `modules` and `version` to the newest cloud kernel that this user can read.
find_kernel() {
    local root found
    found=$(for root in "" "$cache/kernel"; do
        compgen -G "$root/boot/vmlinuz-*-cloud-amd64" || true
    done | while read -r path; do
        if [ -r "$path" ]; then echo "${path##*/vmlinuz-} $path"; fi
    done | sort -V | tail -n 1)
    [ -n "$found" ] || die "no kernel for the guest; run ci/setup"
    version=${found%% *} kernel=${found#* }
    root=${kernel%/boot/*}
    modules=$root/lib/modules/$version
    if [ ! -d "$modules" ]; then modules=$root/usr/lib/modules/$version; fi
    [ -d "$modules" ] || die "no modules for $kernel"
    # The package runs depmod when installed, not when unpacked.
    if [ ! -s "$modules/modules.dep" ]; then depmod -b "${modules%/lib/modules/*}" "$version"; fi
}

# Prints the files of driver $1, relative to $modules, in the order in which they must be loaded.
load_order() {
    awk -v name="$1" -F '[: ]+' '
        { base = $1; sub(".*/", "", base); sub("[.]ko.*", "", base); gsub("-", "_", base) }
        base == name { for (i = NF; i >= 1; i--) if ($i != "") print $i }
    ' "$modules/modules.dep"
}

copy_modules() {
    local driver file name
    mkdir "$root/modules"
    for driver in "${drivers[@]}"; do
        load_order "$driver"
    done | awk '!seen[$0]++' | while read -r file; do
        name=$(basename "$file" | sed 's/[.]ko.*/.ko/')
        case $file in
        *.ko) cat "$modules/$file" ;;
        *.ko.xz) xz -dc "$modules/$file" ;;
        *.ko.zst) zstd -dcq "$modules/$file" ;;
        *) die "unknown kind of module: $file" ;;
        esac >"$root/modules/$name"
        echo "$name" >>"$root/modules/order"
    done
    touch "$root/modules/order"
}

# Copies program $1 and the libraries that it loads.
copy_program() {
    local file
    ldd "$1" | grep -o '/[^ ]*' | while read -r file; do
        mkdir -p "$root${file%/*}"
        cp -L "$file" "$root$file"
    done
    mkdir -p "$root/sbin"
    cp -L "$1" "$root/sbin/"
}

# Packs the directory `root` as the file $1.
pack() { (cd "$root" && find . | cpio --quiet -o -H newc -R 0:0) | gzip -1 >"$1"; }
