#!/usr/bin/env python3
"""Reads a logical volume store, written from the description of the format alone.

    reader.py IMAGE [EXTERNAL]

Prints a JSON object: the store, and for each volume its flags, its parent and the SHA-256 of its
content. EXTERNAL is the content of the external snapshot. Nothing is written; what a power cut has
interrupted is resolved in memory. It shares no code with the crate that it checks.
"""

import hashlib
import json
import struct
import sys


def make_table():
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


TABLE = make_table()


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def crc_is_good(page):
    return struct.unpack_from("<I", page, 4092)[0] == crc32c(page[:4092])


def text(value):
    return value.split(b"\0")[0].decode()


class Store:
    def __init__(self, image, external):
        self.image, self.external = image, external
        page = image[:4096]
        assert page[:8] == b"SPDKBLOB", "signature"
        assert crc_is_good(page), "checksum of the super block"
        self.version, _, self.clean, self.super_blob, self.cluster_size = struct.unpack_from("<IIIQI", page, 8)
        numbers = struct.unpack_from("<6I", page, 32)
        self.page_mask, self.cluster_mask, self.metadata = numbers[0:2], numbers[2:4], numbers[4:6]
        self.blob_mask = struct.unpack_from("<2I", page, 72)
        size, io_unit, md_page = struct.unpack_from("<QII", page, 80)
        self.page_size = md_page or 4096
        self.clusters = (size or len(image)) // self.cluster_size
        self.first = -(-(self.metadata[0] + self.metadata[1]) * self.page_size // self.cluster_size)
        self.blobs = {}
        for number in range(self.metadata[1]):
            page = self.page(number)
            head = struct.unpack_from("<QI", page, 0)
            if head == (0x100000000 | number, 0) and crc_is_good(page):
                self.blobs[head[0]] = Blob(self, number)
        self.resolve()

    def page(self, number):
        start = (self.metadata[0] + number) * self.page_size
        return self.image[start:start + 4096]

    def resolve(self):
        for blob in list(self.blobs.values()):
            mark = blob.internal.get("SNAPRM", blob.internal.get("SNAPTMP"))
            other = self.blobs.get(struct.unpack("<Q", mark)[0]) if mark else None
            if other is None:
                continue
            if other.parent == blob.id:
                blob.data_ro |= 1
                if "SNAPRM" in blob.internal:
                    for index, cluster in enumerate(blob.map):
                        if cluster and index < len(other.map) and other.map[index] == cluster:
                            other.map[index] = 0
            else:
                del self.blobs[blob.id]

    def mask(self, region, kind, bits):
        start = region[0] * self.page_size
        got, length = struct.unpack_from("<BI", self.image, start)
        assert got == kind and length >= bits, "mask"
        return [self.image[start + 5 + i // 8] >> i % 8 & 1 == 1 for i in range(bits)]

    def check(self):
        """Owners of clusters and pages, and the masks of a store that was unloaded."""
        clusters, pages = {}, {}
        for blob in self.blobs.values():
            for cluster in filter(None, blob.map):
                assert self.first <= cluster < self.clusters, f"cluster {cluster} is out of range"
                assert cluster not in clusters, f"cluster {cluster} has two owners"
                clusters[cluster] = blob.id
            for page in blob.pages:
                assert page not in pages, f"page {page} has two owners"
                pages[page] = blob.id
            assert blob.thin or 0 not in blob.map, f"{blob.id:#x} is thick and has holes"
        if self.clean and self.version == 3:
            used = self.mask(self.cluster_mask, 1, self.clusters)
            assert used == [n < self.first or n in clusters for n in range(self.clusters)], "cluster mask"
            used = self.mask(self.page_mask, 0, self.metadata[1])
            assert used == [n in pages for n in range(self.metadata[1])], "page mask"
            used = self.mask(self.blob_mask, 2, self.metadata[1])
            assert used == [n | 0x100000000 in self.blobs for n in range(self.metadata[1])], "blob mask"
        return self.clusters - self.first - len(clusters)

    def cluster(self, blob, index):
        while True:
            if index >= len(blob.map):
                return None
            if blob.map[index]:
                start = blob.map[index] * self.cluster_size
                return self.image[start:start + self.cluster_size]
            if blob.parent is not None:
                blob = self.blobs[blob.parent]
            elif "EXTSNAP" in blob.internal:
                start = index * self.cluster_size
                return self.external[start:start + self.cluster_size].ljust(self.cluster_size, b"\0")
            else:
                return None


class Blob:
    def __init__(self, store, root):
        self.id = 0x100000000 | root
        self.xattrs, self.internal, self.pages = {}, {}, []
        self.invalid = self.data_ro = self.md_ro = 0
        self.map = []
        table, number, sequence = [], root, 0
        while number != 0xFFFFFFFF:
            page = store.page(number)
            assert crc_is_good(page), f"page {number}"
            assert struct.unpack_from("<QI", page, 0) == (self.id, sequence)
            self.pages.append(number)
            table += self.descriptors(page)
            number, sequence = struct.unpack_from("<I", page, 4088)[0], sequence + 1
        self.thin = self.invalid & 1 == 1
        parent = self.internal.get("SNAP")
        self.parent = struct.unpack("<Q", parent)[0] if parent else None
        for at, (count, page_number, pages) in enumerate(table):
            if at and len(self.map) % 512:
                break
            if page_number == 0:
                self.map += [0] * min(512 * pages, count - len(self.map))
                continue
            page = store.page(page_number)
            assert crc_is_good(page), f"extent page {page_number}"
            kind, length, start = struct.unpack_from("<BII", page, 16)
            assert kind == 6 and start == len(self.map) and struct.unpack_from("<I", page, 4088)[0] == 0xFFFFFFFF
            self.pages.append(page_number)
            self.map += struct.unpack_from(f"<{length // 4 - 1}I", page, 25)

    def descriptors(self, page):
        """Takes the descriptors of a page; returns entries of the extent table."""
        at, table = 16, []
        while at + 5 <= 4088:
            kind, length = struct.unpack_from("<BI", page, at)
            at += 5
            if kind == 0 and length == 0:
                break
            payload = page[at:at + length]
            at += length
            if kind == 1:
                for first, count in struct.iter_unpack("<II", payload):
                    self.map += [first and first + i for i in range(count)]
            elif kind in (2, 4):
                name, value = struct.unpack_from("<HH", payload)
                xattrs = self.xattrs if kind == 2 else self.internal
                xattrs[payload[4:4 + name].decode()] = payload[4 + name:4 + name + value]
            elif kind == 3:
                self.invalid, self.data_ro, self.md_ro = struct.unpack("<QQQ", payload)
            elif kind == 5:
                count = struct.unpack_from("<Q", payload)[0]
                table += [(count, *entry) for entry in struct.iter_unpack("<II", payload[8:])]
            else:
                raise AssertionError(f"descriptor {kind}")
        return table


def main():
    with open(sys.argv[1], "rb") as file:
        image = file.read()
    external = open(sys.argv[2], "rb").read() if len(sys.argv) > 2 else b""
    store = Store(image, external)
    free = store.check()
    identity = store.blobs[store.super_blob]
    names = {blob.id: text(blob.xattrs["name"]) for blob in store.blobs.values()}
    zeroes, volumes = bytes(store.cluster_size), {}
    for blob in store.blobs.values():
        if blob is identity:
            continue
        content = hashlib.sha256()
        for index in range(len(blob.map)):
            content.update(store.cluster(blob, index) or zeroes)
        volumes[names[blob.id]] = {
            "uuid": text(blob.xattrs["uuid"]),
            "clusters": len(blob.map),
            "num_allocated_clusters": len(blob.map) - blob.map.count(0),
            "thin": blob.thin,
            "read_only": blob.data_ro & 1 == 1,
            "parent": names.get(blob.parent),
            "sha256": content.hexdigest(),
        }
    print(json.dumps({
        "lvstore": text(identity.xattrs["name"]),
        "uuid": text(identity.xattrs["uuid"]),
        "clean": store.clean,
        "free_clusters": free,
        "lvols": volumes,
    }))


main()
