package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"sync"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	// maxBatch bounds the messages of one send: the kernel copies it as one
	// buffer, and every failure in it is one message to receive.
	maxBatch      = 512
	maxBatchBytes = 64 << 10
	// dumpTries bounds the repetitions of a dump during which the kernel's
	// state changed. Each is a full read, so that 30 of them are most of a
	// second of changes without a pause.
	dumpTries = 30
	// answerTime bounds the wait for the kernel's answer, which normally is
	// there when send returns.
	answerTime = 10 * time.Second
	rcvBuffer  = 4 << 20
)

// conn is a netlink socket. netlink.Handle sends one request at a time; conn sends
// many at once and repeats interrupted dumps.
type conn struct {
	mu  sync.Mutex // one exchange at a time
	fd  int
	seq uint32
	buf []byte
}

func dial(protocol int) (*conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, err
	}
	c := &conn{fd: fd, buf: make([]byte, 64<<10)}
	tv := unix.NsecToTimeval(answerTime.Nanoseconds())
	err = errors.Join(
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		// Failures are told in words, and without a copy of the request.
		unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1),
		unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1),
	)
	// The larger buffer only spares repetitions.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, rcvBuffer)
	if err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

func (c *conn) close() { _ = unix.Close(c.fd) }

// run sends the requests, as many at once as fit, and returns one error per
// request. The kernel goes on after a failure.
func (c *conn) run(reqs ...*nl.NetlinkRequest) []error {
	c.mu.Lock()
	defer c.mu.Unlock()
	errs := make([]error, len(reqs))
	for done := 0; done < len(reqs); {
		var out []byte
		first, n, last := c.seq+1, 0, 0
		for ; done+n < len(reqs) && n < maxBatch; n++ {
			c.seq++
			b := reqs[done+n].Serialize()
			if len(out)+len(b) > maxBatchBytes && n > 0 {
				c.seq--
				break
			}
			binary.NativeEndian.PutUint32(b[8:], c.seq)
			last = len(out)
			out = append(out, b...)
		}
		// Failures are answered anyway; the last message is always answered,
		// and in order, so that its answer ends the batch.
		flags := binary.NativeEndian.Uint16(out[last+6:])
		binary.NativeEndian.PutUint16(out[last+6:], flags|unix.NLM_F_ACK)
		batch := errs[done : done+n]
		if err := c.send(out); err != nil {
			fill(batch, err)
		} else if err := c.acks(batch, first); err != nil {
			fill(batch, err)
		}
		done += n
	}
	return errs
}

// do runs requests of which each needs the one before, and returns the first
// failure.
func (c *conn) do(reqs ...*nl.NetlinkRequest) error {
	for _, err := range c.run(reqs...) {
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *conn) send(b []byte) error {
	return unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
}

// acks receives until the last request of the batch is answered.
func (c *conn) acks(errs []error, first uint32) error {
	for {
		b, err := c.receive()
		if err != nil {
			return err
		}
		for m := range messages(b) {
			i := int(int32(m.seq - first))
			if i < 0 || i >= len(errs) || m.typ != unix.NLMSG_ERROR {
				continue // an answer that an earlier call did not wait for
			}
			errs[i] = m.err()
			if i == len(errs)-1 {
				return nil
			}
		}
	}
}

func (c *conn) receive() ([]byte, error) {
	for {
		n, _, err := unix.Recvfrom(c.fd, c.buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EAGAIN) {
			return nil, fmt.Errorf("no answer from the kernel in %v", answerTime)
		}
		return c.buf[:max(n, 0)], err
	}
}

// dump returns the payloads of all messages that answer a request. A dump during
// which the state changed may lack things that are there, so it is repeated.
func (c *conn) dump(req *nl.NetlinkRequest) ([][]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	req.Flags |= unix.NLM_F_DUMP
	var out [][]byte
	var err error
	for range dumpTries {
		out, err = c.dumpOnce(req)
		if !errors.Is(err, unix.EINTR) {
			return out, err
		}
	}
	return nil, fmt.Errorf("changed during each of %d readings: %w", dumpTries, err)
}

// dumpOnce returns EINTR when the state changed meanwhile.
func (c *conn) dumpOnce(req *nl.NetlinkRequest) ([][]byte, error) {
	c.seq++
	req.Seq = c.seq
	if err := c.send(req.Serialize()); err != nil {
		return nil, err
	}
	var out [][]byte
	interrupted := false
	for {
		b, err := c.receive()
		if err != nil {
			return nil, err
		}
		own := append([]byte(nil), b...) // the payloads outlive the buffer
		for m := range messages(own) {
			if m.seq != c.seq {
				continue
			}
			interrupted = interrupted || m.flags&unix.NLM_F_DUMP_INTR != 0
			switch m.typ {
			case unix.NLMSG_ERROR, unix.NLMSG_DONE:
				if err := m.err(); err != nil {
					return nil, err
				}
				if interrupted {
					return nil, unix.EINTR
				}
				return out, nil
			}
			out = append(out, m.data)
		}
	}
}

// get returns the payload of the one message that answers a request.
func (c *conn) get(req *nl.NetlinkRequest) ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seq++
	req.Seq = c.seq
	if err := c.send(req.Serialize()); err != nil {
		return nil, err
	}
	for {
		b, err := c.receive()
		if err != nil {
			return nil, err
		}
		for m := range messages(b) {
			if m.seq != c.seq {
				continue
			}
			if m.typ == unix.NLMSG_ERROR {
				return nil, m.err()
			}
			return append([]byte(nil), m.data...), nil
		}
	}
}

// message is one netlink message (RFC 3549, section 2.3.2).
type message struct {
	typ, flags uint16
	seq        uint32
	data       []byte
}

// messages yields the messages of one datagram and ends at a malformed one.
func messages(b []byte) iter.Seq[message] {
	return func(yield func(message) bool) {
		for len(b) >= unix.SizeofNlMsghdr {
			n := int(binary.NativeEndian.Uint32(b))
			if n < unix.SizeofNlMsghdr || n > len(b) {
				return
			}
			m := message{typ: binary.NativeEndian.Uint16(b[4:]), flags: binary.NativeEndian.Uint16(b[6:]),
				seq: binary.NativeEndian.Uint32(b[8:]), data: b[unix.SizeofNlMsghdr:n]}
			if !yield(m) {
				return
			}
			b = b[min(align(n), len(b)):]
		}
	}
}

// err returns the failure that an NLMSG_ERROR or NLMSG_DONE tells, with the
// kernel's words if it has some.
func (m message) err() error {
	if len(m.data) < 4 {
		return nil
	}
	code := int32(binary.NativeEndian.Uint32(m.data))
	if code == 0 || m.typ == unix.NLMSG_DONE && code > 0 {
		return nil
	}
	errno := unix.Errno(-code)
	rest := m.data[4:]
	if m.flags&unix.NLM_F_ACK_TLVS == 0 || m.typ != unix.NLMSG_ERROR || len(rest) < unix.SizeofNlMsghdr {
		return errno
	}
	skip := unix.SizeofNlMsghdr
	if m.flags&unix.NLM_F_CAPPED == 0 {
		skip = align(int(binary.NativeEndian.Uint32(rest)))
	}
	for t, v := range attrs(rest[min(skip, len(rest)):]) {
		if t == unix.NLMSGERR_ATTR_MSG {
			return fmt.Errorf("%w: %s", errno, unix.ByteSliceToString(v))
		}
	}
	return errno
}

// attrs yields the attributes in b, type without flags, and ends at a malformed
// one.
func attrs(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= unix.SizeofRtAttr {
			n := int(binary.NativeEndian.Uint16(b))
			if n < unix.SizeofRtAttr || n > len(b) {
				return
			}
			t := binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
			if !yield(t, b[unix.SizeofRtAttr:n]) {
				return
			}
			b = b[min(align(n), len(b)):]
		}
	}
}

func align(n int) int { return (n + 3) &^ 3 }

// u8, u16 and u32 read an attribute of the kernel's own byte order; a short one
// is 0.
func u8(b []byte) uint8 {
	if len(b) < 1 {
		return 0
	}
	return b[0]
}

func u32(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(b)
}

// port16 reads an attribute of network byte order.
func port16(b []byte) uint16 {
	if len(b) < 2 {
		return 0
	}
	return binary.BigEndian.Uint16(b)
}

// text reads a string attribute, with or without its final zero.
func text(b []byte) string { return unix.ByteSliceToString(b) }
