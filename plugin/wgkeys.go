package main

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/weftnet/weft/store"
)

// wgKeyFile holds the private WireGuard keys of this host, in the state folder. They
// never leave it.
const wgKeyFile = "wireguard.json"

// wgKeys are the WireGuard keys of this host. Its methods may be called from any
// goroutine.
type wgKeys struct {
	path string
	port uint16

	mu   sync.Mutex // guards what follows
	file wgKeyState
}

// wgKeyState is what the file holds. A host changes its key in steps, each of which the
// peers must have taken before the next (store.Tunnel):
//
//	[old]       last=false  as always
//	[old, new]  last=false  the second way is built, of the new key
//	[old, new]  last=true   traffic takes it; packets of the first way still arrive
//	[new, new]  last=true   the first way is built anew
//	[new, new]  last=false  traffic takes it
//	[new]       last=false  the second way is gone, and the old key with it
type wgKeyState struct {
	Keys []wgKey `json:"keys"`
	Last bool    `json:"last,omitempty"`
}

// rotates reports whether the key is being changed.
func (s wgKeyState) rotates() bool { return len(s.Keys) > 1 || s.Last }

type wgKey struct {
	Private store.WGKey `json:"private"`
	Made    time.Time   `json:"made"`
}

func (k wgKey) public() (store.WGKey, error) {
	private, err := ecdh.X25519().NewPrivateKey(k.Private[:])
	if err != nil {
		return store.WGKey{}, err
	}
	return store.WGKey(private.PublicKey().Bytes()), nil
}

func newWGKey() (wgKey, error) {
	k, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return wgKey{}, err
	}
	return wgKey{Private: store.WGKey(k.Bytes()), Made: time.Now().UTC()}, nil
}

// loadKeys reads or makes the identity and the WireGuard keys of the host whose state is in
// dir. A new identity has new WireGuard keys: peers refuse a host that tells those of
// another, as its former self is to them.
func loadKeys(dir string, port uint16) (store.Identity, *wgKeys, error) {
	id, err := store.LoadIdentity(dir, wgKeyFile)
	if err != nil {
		return id, nil, err
	}
	keys, err := openWGKeys(filepath.Join(dir, wgKeyFile), port)
	return id, keys, err
}

// openWGKeys reads the keys, or makes the first one.
func openWGKeys(path string, port uint16) (*wgKeys, error) {
	w := &wgKeys{path: path, port: port}
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		k, err := newWGKey()
		if err != nil {
			return nil, err
		}
		return w, w.write(wgKeyState{Keys: []wgKey{k}})
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(raw, &w.file); err != nil || len(w.file.Keys) < 1 || len(w.file.Keys) > 2 {
		return nil, fmt.Errorf("WireGuard key %s is damaged; remove it to give this host a new one", path)
	}
	return w, nil
}

// write puts the state into the file, then into use.
func (w *wgKeys) write(s wgKeyState) error {
	raw, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := store.WriteSecret(w.path, raw); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.file = s
	return nil
}

func (w *wgKeys) state() wgKeyState {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.file
}

// tunnel is what peers need to know.
func (w *wgKeys) tunnel() (store.Tunnel, error) {
	s := w.state()
	t := store.Tunnel{Port: w.port, Last: s.Last}
	for _, k := range s.Keys {
		public, err := k.public()
		if err != nil {
			return t, err
		}
		t.Keys = append(t.Keys, public)
	}
	return t, nil
}

// private returns the private key of a public one.
func (w *wgKeys) private(public store.WGKey) (store.WGKey, bool) {
	for _, k := range w.state().Keys {
		if p, err := k.public(); err == nil && p == public {
			return k.Private, true
		}
	}
	return store.WGKey{}, false
}

// put writes a state and tells the peers and the data plane.
func (w *wgKeys) put(db *store.DB, s wgKeyState) error {
	if err := w.write(s); err != nil {
		return err
	}
	t, err := w.tunnel()
	if err != nil {
		return err
	}
	return db.SetTunnel(t)
}
