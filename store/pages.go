package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"math"
)

// checkPages verifies the page structure of a bbolt file: every page that can be
// reached is inside the file, is what it says, is used once, and its elements lie
// inside it in order. bbolt has such a check, but runs it in a goroutine of its
// own on the memory map, where a wrong page number ends the process.
//
// The format is that of bbolt/internal/common: page.go, meta.go, bucket.go.
func checkPages(file []byte, pageSize uint64) error {
	m, ok := currentMeta(file, pageSize)
	if !ok {
		return errors.New("no valid meta page")
	}
	w := pageWalk{file: file, size: pageSize, high: m.high, used: map[uint64]bool{0: true, 1: true}}
	if m.high < 2 || m.high > uint64(len(file))/pageSize {
		return fmt.Errorf("file has %d bytes, %d pages of %d were written", len(file), m.high, pageSize)
	}
	if err := w.page(m.root); err != nil {
		return err
	}
	if m.freelist == math.MaxUint64 { // the list is not kept in the file
		return nil
	}
	return w.freelist(m.freelist)
}

const (
	metaMagic    = 0xED0CDAED
	metaVersion  = 2
	pageHeader   = 16 // id 8, flags 2, count 2, overflow 4
	elementBytes = 16
	metaBytes    = 64
	flagBranch   = 0x01
	flagLeaf     = 0x02
	flagFreelist = 0x10
	flagBucket   = 0x01 // of a leaf element
)

type boltMeta struct{ root, freelist, high, txid uint64 }

// currentMeta returns the valid meta page with the highest transaction.
func currentMeta(file []byte, pageSize uint64) (best boltMeta, ok bool) {
	le := binary.LittleEndian
	for _, at := range []uint64{0, pageSize} {
		b, inside := part(file, at+pageHeader, metaBytes)
		if !inside {
			continue
		}
		h := fnv.New64a()
		_, _ = h.Write(b[:metaBytes-8])
		if le.Uint32(b) != metaMagic || le.Uint32(b[4:]) != metaVersion || h.Sum64() != le.Uint64(b[metaBytes-8:]) {
			continue
		}
		m := boltMeta{root: le.Uint64(b[16:]), freelist: le.Uint64(b[32:]), high: le.Uint64(b[40:]), txid: le.Uint64(b[48:])}
		if !ok || m.txid > best.txid {
			best, ok = m, true
		}
	}
	return best, ok
}

type pageWalk struct {
	file       []byte
	size, high uint64
	used       map[uint64]bool
}

// take returns the bytes of page id with its overflow, and marks them used.
func (w pageWalk) take(id uint64) (page []byte, flags, count uint16, err error) {
	if id < 2 || id >= w.high {
		return nil, 0, 0, fmt.Errorf("page %d is outside the %d written", id, w.high)
	}
	b := w.file[id*w.size:]
	le := binary.LittleEndian
	over := uint64(le.Uint32(b[12:]))
	if le.Uint64(b) != id || id+over >= w.high {
		return nil, 0, 0, fmt.Errorf("page %d says that it is %d with %d more", id, le.Uint64(b), over)
	}
	for i := id; i <= id+over; i++ {
		if w.used[i] {
			return nil, 0, 0, fmt.Errorf("page %d is used twice", i)
		}
		w.used[i] = true
	}
	return b[:(over+1)*w.size], le.Uint16(b[8:]), le.Uint16(b[10:]), nil
}

func (w pageWalk) page(id uint64) error {
	p, flags, count, err := w.take(id)
	if err != nil {
		return err
	}
	switch flags {
	case flagLeaf:
		return w.leaf(id, p, count)
	case flagBranch:
		return w.branch(id, p, count)
	}
	return fmt.Errorf("page %d has type %#x", id, flags)
}

func (w pageWalk) branch(id uint64, p []byte, count uint16) error {
	var last []byte
	for i := range int(count) {
		at := pageHeader + i*elementBytes
		if at+elementBytes > len(p) {
			return fmt.Errorf("page %d: element %d is outside", id, i)
		}
		le := binary.LittleEndian
		key, ok := part(p, uint64(at)+uint64(le.Uint32(p[at:])), uint64(le.Uint32(p[at+4:])))
		if !ok || i > 0 && bytes.Compare(last, key) >= 0 {
			return fmt.Errorf("page %d: key of element %d is outside or out of order", id, i)
		}
		last = key
		if err := w.page(le.Uint64(p[at+8:])); err != nil {
			return err
		}
	}
	if count == 0 {
		return fmt.Errorf("page %d leads nowhere", id)
	}
	return nil
}

func (w pageWalk) leaf(id uint64, p []byte, count uint16) error {
	var last []byte
	for i := range int(count) {
		at := pageHeader + i*elementBytes
		if at+elementBytes > len(p) {
			return fmt.Errorf("page %d: element %d is outside", id, i)
		}
		le := binary.LittleEndian
		start, klen, vlen := uint64(at)+uint64(le.Uint32(p[at+4:])), uint64(le.Uint32(p[at+8:])), uint64(le.Uint32(p[at+12:]))
		key, ok1 := part(p, start, klen)
		value, ok2 := part(p, start+klen, vlen)
		if !ok1 || !ok2 || i > 0 && bytes.Compare(last, key) >= 0 {
			return fmt.Errorf("page %d: element %d is outside or out of order", id, i)
		}
		last = key
		if le.Uint32(p[at:])&flagBucket == 0 {
			continue
		}
		if err := w.bucket(id, value); err != nil {
			return err
		}
	}
	return nil
}

// bucket checks a bucket's header: the page of its root, or, when that is 0, a
// small leaf page that follows.
func (w pageWalk) bucket(id uint64, value []byte) error {
	const header = 16 // root 8, sequence 8
	if len(value) < header {
		return fmt.Errorf("page %d: bucket is cut off", id)
	}
	if root := binary.LittleEndian.Uint64(value); root != 0 {
		return w.page(root)
	}
	inline := value[header:]
	if len(inline) < pageHeader || binary.LittleEndian.Uint16(inline[8:]) != flagLeaf {
		return fmt.Errorf("page %d: bucket inside it is damaged", id)
	}
	return w.leaf(id, inline, binary.LittleEndian.Uint16(inline[10:]))
}

// freelist checks that free pages are inside the file and not in use.
func (w pageWalk) freelist(id uint64) error {
	p, flags, small, err := w.take(id)
	if err != nil {
		return err
	}
	count, at := uint64(small), uint64(pageHeader)
	if small == math.MaxUint16 { // the real count is the first entry
		count, at = binary.LittleEndian.Uint64(p[at:]), at+8
	}
	if flags != flagFreelist || count > (uint64(len(p))-at)/8 {
		return fmt.Errorf("page %d is not the list of free pages", id)
	}
	for i := range count {
		free := binary.LittleEndian.Uint64(p[at+8*i:])
		if free >= w.high || w.used[free] {
			return fmt.Errorf("page %d is free and in use, or outside", free)
		}
		w.used[free] = true
	}
	return nil
}

func part(p []byte, start, n uint64) ([]byte, bool) {
	if start+n > uint64(len(p)) {
		return nil, false
	}
	return p[start : start+n], true
}
