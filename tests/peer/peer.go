// Package peer is a host of the cluster that signs records and tells endpoints like any
// other, and has nothing in its kernel.
package peer

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/weftnet/weft/store"
	"github.com/weftnet/weft/store/gossip"
)

// Peer is what such a host is told.
type Peer struct {
	Dir      string          `json:"dir"`  // of its identity and database
	Name     string          `json:"name"` // also its version
	Address  netip.Addr      `json:"address"`
	Join     []string        `json:"join"`
	Key      string          `json:"key"`    // of the cluster, hex
	Tunnel   store.WGKey     `json:"tunnel"` // the public key that it tells
	Networks []store.Network `json:"networks"`
}

// Read reads what a process is to be from a file.
func Read(file string, into any) error {
	raw, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	return json.Unmarshal(raw, into)
}

// Run is the host until ctx ends. put adds its endpoints of a network.
func (p Peer) Run(ctx context.Context, put func(*store.Tx, store.Network) error) error {
	key, err := hex.DecodeString(p.Key)
	if err != nil {
		return err
	}
	identity, err := store.LoadIdentity(p.Dir)
	if err != nil {
		return err
	}
	db, err := store.Open(filepath.Join(p.Dir, "weft.db"), store.Host{ID: identity.ID, Name: p.Name, Address: p.Address, DataPort: gossip.DefaultDataPort,
		Version: p.Name, Tunnel: store.Tunnel{Keys: []store.WGKey{p.Tunnel}, Port: 4798}})
	if err != nil {
		return err
	}
	defer db.Close()
	err = db.Update(ctx, func(tx *store.Tx) error {
		for _, n := range p.Networks {
			if err := tx.PutNetwork(n); err != nil {
				return err
			}
			if err := put(tx, n); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	members, err := gossip.New(gossip.Config{DB: db, Identity: identity, Join: p.Join, Key: key})
	if err != nil {
		return err
	}
	return members.Run(ctx)
}
